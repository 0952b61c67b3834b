"""Loading models, and the one way their hidden states become log-probabilities or rewards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from artifacts.errors import StageError
from stages.data.content_parts import of_texts
from stages.losses.head import Head
from stages.losses.head_gradient import GradientTotal
from stages.losses.logprobs import TokenScores, linear_logprobs
from stages.losses.token_loss import TokenLossFunction, linear_token_loss
from stages.training import quantization
from stages.training.adapted_head import head_weight, widened
from stages.training.attention import packed_pass
from stages.training.batch import Group, TokenBatch, layout
from stages.training.model_check import check_loaded, check_no_code, load_checked
from stages.training.multimodal import LanguageModels, freeze_beside_text, template_of_processor
from stages.training.objective import Readout
from stages.training.tied_embedding import TiedEmbedding
from stages.training.trunk import context_of, language_model, trunk_of

_SHAPES_MULTIPLE = {"cuda": 256}
"""Tokens of a row, and positions read in the last layer, by device: a matrix product of a shape that was not met
before costs a GPU's host some 100 microseconds, so that lengths as they come would take longer than the computing."""
_FEW = 0.8
"""Share of positions read above which choosing them before the last layer saves nothing."""


def quietly() -> None:
    """The library's progress bars would fill the stage's log; the loop reports progress of its own."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder, its chat template for messages of text. Raises StageError when there is none."""
    from transformers import AutoTokenizer

    check_no_code(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizer's library raises bare ones
        raise StageError(f"the model folder {folder.name} has no usable tokenizer: {error}") from error
    template = tokenizer.chat_template or template_of_processor(folder)
    if isinstance(template, str):
        tokenizer.chat_template = of_texts(template, tokenizer.special_tokens_map)
    return tokenizer


def keep_softcapping(model: Any) -> None:
    """transformers' default attention leaves the soft-capping of scores out; its plain one has it."""
    model = language_model(model)
    if getattr(model.config, "attn_logit_softcapping", None) is not None:
        model.set_attn_implementation("eager")


def load_causal_lm(folder: Path, **quantized: Any) -> Any:
    """The causal language model of a checked folder, in float32 but for what `quantized` says (`quantization`); a
    multimodal one is whole, with its language model to be trained (`multimodal`).

    Raises StageError when weights are missing, extra, misshapen or not finite.
    """
    quietly()
    model, info = load_checked(LanguageModels, folder, **quantized)
    if quantized:
        quantization.settle(folder, model)
    keep_softcapping(model)
    check_loaded(folder, model, info)
    freeze_beside_text(model)
    return model


class Scorer(nn.Module):
    """A model as the objectives see it: hidden states of a batch, read out at the asked-for positions only."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.share_prefixes = False
        """Packed rows of prefix trees, once `probes.settle_layout` has seen that the model can; else a padded row a
        branch."""
        self.reads_few = False
        """The last layer can be run on the positions that are read alone."""
        self.tied: TiedEmbedding | None = None
        self.head_total: GradientTotal | None = None
        """What all micro-batches of a step add the head's gradient to."""
        self._head_of_pass: tuple[Tensor, ...] = ()
        """The tied weight as this very pass uses it; in a tuple, for a module would register a parameter as its own."""
        self.vocabulary = int(self.transformers_model.get_input_embeddings().weight.shape[0])
        """Number of token ids that the model has an embedding for; known before ZeRO-3 leaves the weight empty."""

    def merge_gradients(self) -> None:
        """Let a step's micro-batches add to one gradient of the head in place, and embedding and head of a model that
        ties them share it. For weights that are whole in this process; all passes must go through here."""
        self.tied = TiedEmbedding.of(self.transformers_model)
        weight_VH = getattr(self.transformers_model.get_output_embeddings(), "weight", None)
        self.head_total = None if weight_VH is None else GradientTotal(weight_VH)

    @property
    def transformers_model(self) -> Any:
        """The model without adapters' wrapping (adapters stay active inside it)."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def context_length(self) -> int:
        """Most tokens of a row; `trunk.UNBOUNDED` where the model has no bound."""
        return context_of(self.transformers_model.config)

    def head(self, temperature: float = 1.0) -> Head:
        """The language-modelling head with what the architecture does to its logits."""
        model = self.transformers_model
        weight_VH, bias_V = head_weight(model.get_output_embeddings())
        config = model.config.get_text_config()
        is_total = self.head_total is not None and weight_VH is self.head_total.weight_VH
        return Head(
            self._head_of_pass[0] if self._head_of_pass else weight_VH,
            bias_V,
            total=self.head_total if is_total else None,
            scale=getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1.0),
            softcap=getattr(config, "final_logit_softcapping", None),
            temperature=temperature,
        )

    def layout(self, groups: list[Group]) -> TokenBatch:
        """The groups as tensors on the model's device."""
        return laid_out(groups, share_prefixes=self.share_prefixes, device=self.device)

    @property
    def _multiple(self) -> int:
        return _SHAPES_MULTIPLE.get(self.device.type, 1)

    def forward(self, batch: TokenBatch, readout: Readout) -> Any:
        """Run the layers, and read what the readout asks for out of the hidden states at its positions."""
        assert batch.packed is None or self.share_prefixes, "this model has not been seen to take packed rows"
        extra: dict[str, Any] = {} if batch.packed is None else {"packed": batch.packed}
        few = self.reads_few and bool(extra) and len(readout.positions_R) < _FEW * batch.num_tokens
        if readout.of_routers is not None:
            few, extra["output_router_logits"] = False, True
        if few:
            missing = -len(readout.positions_R) % self._multiple
            extra["reads"] = torch.nn.functional.pad(readout.positions_R, (0, missing))
        if batch.packed is not None:
            # nobody reads it; without one transformers asks the positions for packed rows, and the host waits for that
            extra["attention_mask"] = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=self.device).expand(
                1, 1, *2 * batch.input_ids_BT.shape[1:]
            )
        inputs = {"input_ids": batch.input_ids_BT, "position_ids": batch.position_ids_BT, "use_cache": False, **extra}
        noise = nullcontext() if batch.noise is None else self._embedding_noise(batch.noise)
        with noise, nullcontext() if batch.packed is None else packed_pass():
            if self.tied is None:
                output = trunk_of(self.transformers_model)(**inputs)
            else:
                output, head_VH = self.tied.call(**inputs)
                self._head_of_pass = (head_VH,)
        hidden_PH = output.last_hidden_state.flatten(0, 1)
        hidden_RH = hidden_PH if few else hidden_PH.index_select(0, readout.positions_R)
        if len(hidden_RH) > len(readout.positions_R):
            hidden_RH = hidden_RH[: len(readout.positions_R)]
        try:
            result = readout.read(widened(hidden_RH, self.transformers_model.get_output_embeddings()), self)
            return result if readout.of_routers is None else (result, readout.of_routers(output.router_logits))
        finally:
            self._head_of_pass = ()

    @contextmanager
    def _embedding_noise(self, noise: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """The input embeddings of the passes inside go through `noise`."""
        embedding = self.transformers_model.get_input_embeddings()
        handle = embedding.register_forward_hook(lambda _module, _inputs, output: noise(output))
        try:
            yield
        finally:
            handle.remove()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.parameters()).device


def laid_out(groups: Sequence[Group], *, share_prefixes: bool, device: torch.device) -> TokenBatch:
    """The groups as tensors on a device, of the shapes that are fast there."""
    multiple = _SHAPES_MULTIPLE.get(device.type, 1)
    return layout(groups, share_prefixes=share_prefixes, multiple=multiple).to(device)


def token_logprobs(
    batch: TokenBatch, *, temperature: float = 1.0, with_entropy: bool = False, with_squares: bool = False
) -> Readout:
    """A readout: the TokenScores of the batch's asked-for tokens. With gradients, entropy is nearly free."""

    def read(hidden_NH: Tensor, scorer: nn.Module) -> TokenScores:
        assert isinstance(scorer, Scorer)
        head = scorer.head(temperature)
        return linear_logprobs(hidden_NH, head, batch.target_N, with_entropy=with_entropy, with_squares=with_squares)

    return Readout(batch.source_N, read)


def token_losses(batch: TokenBatch, token_loss: TokenLossFunction, *, temperature: float = 1.0) -> Readout:
    """A readout: (sum of `token_loss` over the batch's asked-for tokens, their TokenScores without a gradient).

    For losses of a token that need no other token's log-probability; they cost one product of the head less.
    """

    def read(hidden_NH: Tensor, scorer: nn.Module) -> tuple[Tensor, TokenScores]:
        assert isinstance(scorer, Scorer)
        return linear_token_loss(hidden_NH, scorer.head(temperature), batch.target_N, token_loss)

    return Readout(batch.source_N, read)


def branch_rewards(batch: TokenBatch) -> Readout:
    """A readout: reward [K] of every branch, from the hidden state of its last token."""

    return Readout(batch.last_K, head_scores)


def head_scores(hidden_NH: Tensor, scorer: nn.Module) -> Tensor:
    """[N] of the scalar head of a model that has one, at hidden states of its trunk."""
    assert isinstance(scorer, Scorer)
    scores_N1: Tensor = scorer.transformers_model.score(hidden_NH)
    return scores_N1[:, 0].float()
