"""Loading models, and the one way their hidden states become log-probabilities or rewards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from artifacts.errors import StageError
from stages.losses.logprobs import Head, TokenScores, linear_logprobs
from stages.seeds import derive
from stages.training.batch import Branch, Group, TokenBatch, layout
from stages.training.config import TrainingConfig
from stages.training.model_check import check_loaded, check_model_folder
from stages.training.objective import Readout

_PROBE_TOLERANCE = 1e-3
"""Largest difference of a log-probability that reordered float32 sums explain."""


def _quietly() -> None:
    """The library's progress bars would fill the stage's log; the loop reports progress of its own."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder. Raises StageError when there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise StageError(f"the model folder {folder.name} has no usable tokenizer: {error}") from error


def load_causal_lm(folder: Path) -> Any:
    """The causal language model of a checked folder, in float32.

    Raises StageError when weights are missing, extra, misshapen or not finite.
    """
    from transformers import AutoModelForCausalLM

    _quietly()
    check_model_folder(folder)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True, output_loading_info=True
    )
    model, info = loaded
    check_loaded(folder, model, info)
    return model


def load_reward_model(folder: Path, *, new_head_seed: int | None = None) -> Any:
    """A sequence classifier with one output. With `new_head_seed`, a causal model's folder gets a fresh head."""
    from transformers import AutoModelForSequenceClassification

    _quietly()
    check_model_folder(folder)
    loaded: Any = AutoModelForSequenceClassification.from_pretrained(
        folder,
        num_labels=1,
        dtype=torch.float32,
        attn_implementation="sdpa",
        local_files_only=True,
        output_loading_info=True,
    )
    model, info = loaded
    if new_head_seed is None:
        check_loaded(folder, model, info)
    else:
        check_loaded(folder, model, info, expected_missing=("score.",), expected_extra=("lm_head.",))
        draws = torch.Generator().manual_seed(derive(new_head_seed, "score"))
        with torch.no_grad():
            weight = model.score.weight
            weight.copy_(torch.randn(weight.shape, generator=draws) * weight.shape[1] ** -0.5)
    return model


def add_adapters(model: Any, config: TrainingConfig) -> Any:
    """The model with LoRA adapters where the configuration asks for them."""
    if config.lora_r is None:
        return model
    from peft import LoraConfig, get_peft_model

    targets = config.lora_target_modules
    classifier = hasattr(model, "score")
    torch.manual_seed(derive(config.seed, "lora"))
    return get_peft_model(
        model,
        LoraConfig(
            r=config.lora_r,
            lora_alpha=config.lora_alpha,  # type: ignore[arg-type]
            lora_dropout=config.lora_dropout,
            target_modules=targets if isinstance(targets, str) else list(targets),
            task_type="SEQ_CLS" if classifier else "CAUSAL_LM",
        ),
    )


class Scorer(nn.Module):
    """A model as the objectives see it: hidden states of a batch, read out at the asked-for positions only."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.share_prefixes = True

    @property
    def transformers_model(self) -> Any:
        """The model without adapters' wrapping (adapters stay active inside it)."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def context_length(self) -> int:
        """Most tokens of a row."""
        return int(self.transformers_model.config.max_position_embeddings)

    def head(self, temperature: float = 1.0) -> Head:
        """The language-modelling head with what the architecture does to its logits."""
        model = self.transformers_model
        output = model.get_output_embeddings()
        config = model.config
        return Head(
            output.weight,
            output.bias,
            scale=getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1.0),
            softcap=getattr(config, "final_logit_softcapping", None),
            temperature=temperature,
        )

    def layout(self, groups: list[Group]) -> TokenBatch:
        """The groups as tensors on the model's device."""
        batch = layout(groups, share_prefixes=self.share_prefixes)
        return batch.to(next(self.parameters()).device)

    def forward(self, batch: TokenBatch, readout: Readout) -> Any:
        """Run the layers and read out of the hidden states [B x T, H]."""
        hidden_BTH = self.transformers_model.base_model(
            input_ids=batch.input_ids_BT,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids_BT,
            use_cache=False,
        ).last_hidden_state
        return readout(hidden_BTH.flatten(0, 1), self)

    def check_head(self) -> None:
        """Raises StageError when our log-probabilities differ from the model's own logits on a short row."""
        ids = self._probe_ids()
        batch = layout([Group("probe", ids[:4], (Branch(ids[4:]),))]).to(self._device)
        with _evaluating(self):
            ours_N = self.forward(batch, token_logprobs(batch)).logprobs_N
            logits_TV = self.transformers_model(input_ids=torch.tensor([ids], device=self._device)).logits[0].float()
        own_N = logits_TV[3:-1].log_softmax(-1).gather(1, batch.target_N[:, None])[:, 0]
        if (difference := float((ours_N - own_N).abs().max())) > _PROBE_TOLERANCE:
            raise StageError(
                f"{type(self.transformers_model).__name__}: log-probabilities from its hidden states and head differ "
                f"from its own logits by {difference:.3g}; what it does to its logits is not supported"
            )

    def settle_prefix_sharing(self) -> str | None:
        """Compare hidden states of a shared with those of separate prefixes on a short row.

        Where they differ, every completion gets its own copy of the prompt from now on; returns the reason.
        """
        ids = self._probe_ids()
        group = Group("probe", ids[:4], (Branch(ids[4:7]), Branch(ids[7:])))
        read = []
        with _evaluating(self):
            for share in (True, False):
                batch = layout([group], share_prefixes=share).to(self._device)
                read.append(self.forward(batch, _hidden_at(batch.source_N)))
        difference = float((read[0] - read[1]).abs().max() / read[1].abs().max())
        if difference <= _PROBE_TOLERANCE:
            return None
        self.share_prefixes = False
        return f"a shared prefix changes hidden states by {difference:.2g} in {type(self.transformers_model).__name__}"

    def _probe_ids(self) -> list[int]:
        vocabulary = self.transformers_model.get_input_embeddings().weight.shape[0]
        return [(7 * i + 1) % vocabulary for i in range(9)]

    @property
    def _device(self) -> torch.device:
        return next(self.parameters()).device


def token_logprobs(batch: TokenBatch, *, temperature: float = 1.0) -> Readout:
    """A readout: the TokenScores of the batch's asked-for tokens."""

    def read(hidden_PH: Tensor, scorer: nn.Module) -> TokenScores:
        assert isinstance(scorer, Scorer)
        head = scorer.head(temperature)
        return linear_logprobs(
            hidden_PH.index_select(0, batch.source_N),
            head.weight_VH,
            head.bias_V,
            batch.target_N,
            temperature=temperature,
            softcap=head.softcap,
            scale=head.scale,
        )

    return read


def branch_rewards(batch: TokenBatch) -> Readout:
    """A readout: reward [K] of every branch, from the hidden state of its last token."""

    def read(hidden_PH: Tensor, scorer: nn.Module) -> Tensor:
        assert isinstance(scorer, Scorer)
        rewards_K1: Tensor = scorer.transformers_model.score(hidden_PH.index_select(0, batch.last_K))
        return rewards_K1[:, 0].float()

    return read


def _hidden_at(index: Tensor) -> Readout:
    return lambda hidden_PH, _: hidden_PH.index_select(0, index)


@contextmanager
def _evaluating(scorer: Scorer) -> Iterator[None]:
    """No gradients, no dropout."""
    was_training = scorer.training
    scorer.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        scorer.train(was_training)
