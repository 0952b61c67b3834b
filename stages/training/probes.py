"""What is tried on a loaded model before it is trusted: its head, and what its rows can share."""

from __future__ import annotations

from collections.abc import Iterator, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from artifacts.errors import StageError
from stages.training import attention, gated_mlp, last_layer, linear, rms_norm, rope
from stages.training.batch import Branch, Group, TokenBatch, layout
from stages.training.model import Scorer, token_logprobs
from stages.training.objective import Readout
from stages.training.trunk import is_multimodal, language_model

_TOLERANCE = 1e-3
"""Largest difference of a log-probability that reordered float32 sums explain."""
_LAYER_TYPES = {"full_attention", "sliding_attention"}


def check_head(scorer: Scorer) -> None:
    """Raises StageError when our log-probabilities differ from the model's own logits on a short row, and for a model
    that sees tokens which come later."""
    ids = _probe_ids(scorer)
    batch = layout([Group("probe", ids[:4], (Branch(ids[4:]),))], share_prefixes=False).to(scorer.device)
    with _evaluating(scorer):
        ours_N = scorer(batch, token_logprobs(batch)).logprobs_N
        logits_TV = _own_logits(scorer, ids)
        change = float((_own_logits(scorer, ids[:5]) - logits_TV[:5]).abs().max() / logits_TV.abs().max())
    own_N = logits_TV[3:-1].log_softmax(-1).gather(1, batch.target_N[:, None])[:, 0]
    if (difference := float((ours_N - own_N).abs().max())) > _TOLERANCE:
        raise StageError(
            f"{type(scorer.transformers_model).__name__}: log-probabilities from its hidden states and head differ "
            f"from its own logits by {difference:.3g}; what it does to its logits is not supported"
        )
    if change > _TOLERANCE:
        raise StageError(
            f"{type(scorer.transformers_model).__name__}: tokens that come later change the logits of those before, by "
            f"{change:.2g} of the largest; only causal language models can be trained"
        )


def _own_logits(scorer: Scorer, ids: list[int]) -> Tensor:
    """[T, V]."""
    model = scorer.transformers_model
    try:
        logits_TV: Tensor = model(input_ids=torch.tensor([ids], device=scorer.device)).logits[0].float()
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        if not is_multimodal(model.config) or isinstance(error, torch.OutOfMemoryError):
            raise
        raise StageError(
            f"{type(model).__name__} does not run on text alone ({type(error).__name__}: {error}); take a checkpoint "
            "of a language model of text alone"
        ) from error
    return logits_TV


def scorers_in(scorer: nn.Module) -> list[Scorer]:
    """This one, and those inside it: a policy may have a value model beside it."""
    return [module for module in scorer.modules() if isinstance(module, Scorer)]


def settle_layout(scorer: Scorer) -> str | None:
    """Switch to packed rows of prefix trees, and keep them where they give the hidden states of separate rows.

    Where they do not, every branch gets a row of its own from now on; returns the reason. What sees the same rows does
    as one does: a policy and its value model.
    """
    together = scorers_in(scorer)
    reasons = [reason for reason in map(_settle, together) if reason is not None]
    for one in together:
        one.share_prefixes = not reasons
    return reasons[0] if reasons else None


def _settle(scorer: Scorer) -> str | None:
    scorer.share_prefixes = False
    rms_norm.install(scorer.transformers_model)
    rope.install(scorer.transformers_model)
    linear.install(scorer.transformers_model)
    gated_mlp.install(scorer.transformers_model)
    ids = _probe_ids(scorer)
    groups = [Group("a", ids[:4], (Branch(ids[4:7]), Branch(ids[7:]))), Group("b", ids[1:3], (Branch(ids[5:]),))]
    separate_NH = _asked_hidden(scorer, layout(groups, share_prefixes=False))
    reason = obstacle(scorer.transformers_model)
    if reason is None:
        attention.register()
        attending = language_model(scorer.transformers_model)
        before = attending.config._attn_implementation
        attending.set_attn_implementation(attention.NAME)
        scorer.share_prefixes = True
        try:
            reason = _difference(scorer, layout(groups), separate_NH)
        except (attention.UnsupportedAttentionError, TypeError) as error:
            reason = str(error)
        if reason is not None:
            scorer.share_prefixes = False
            attending.set_attn_implementation(before)
    if scorer.share_prefixes and last_layer.fits(scorer.transformers_model):
        _settle_last_layer(scorer, layout(groups), separate_NH)
    return None if reason is None else f"{reason} in {type(scorer.transformers_model).__name__}"


def _settle_last_layer(scorer: Scorer, batch: TokenBatch, separate_NH: Tensor) -> None:
    last_layer.install(scorer.transformers_model)
    scorer.reads_few = True
    try:
        equal = float((_asked_hidden(scorer, batch) - separate_NH).abs().max() / separate_NH.abs().max()) < _TOLERANCE
    except TypeError:  # its parts take other arguments
        equal = False
    if not equal:
        last_layer.remove(scorer.transformers_model)
        scorer.reads_few = False


def obstacle(model: Any) -> str | None:
    """What is known of a transformers model without trying: why its attention cannot be replaced by ours."""
    model = language_model(model)
    if not getattr(model, "_supports_attention_backend", False):
        return "attention cannot be replaced"
    if getattr(model.config, "index_topk", None) is not None:  # its indexer reads the mask that we leave out
        return "attention to the tokens that an indexer picks"
    unknown = set(getattr(model.config, "layer_types", None) or ()) - _LAYER_TYPES
    return f"layers of type {', '.join(sorted(unknown))}" if unknown else None


def _difference(scorer: Scorer, batch: TokenBatch, separate_NH: Tensor) -> str | None:
    batch = batch.to(scorer.device)
    packed_NH = _asked_hidden(scorer, batch)
    difference = float((packed_NH - separate_NH).abs().max() / separate_NH.abs().max())
    if difference > _TOLERANCE:
        return f"a shared prefix changes hidden states by {difference:.2g}"
    assert batch.packed is not None
    return untold_window(scorer.transformers_model.config.get_text_config(), batch.packed.windows)


def untold_window(config: Any, told: Set[int | None]) -> str | None:
    """What is wrong where a model has a sliding window and its attention was `told` of others only."""
    layer_types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in layer_types if layer_types else getattr(config, "use_sliding_window", True)
    if window is not None and slides and window not in told:
        return f"the attention is not told of its sliding window of {window} tokens"
    return None


def _asked_hidden(scorer: Scorer, batch: TokenBatch) -> Tensor:
    batch = batch.to(scorer.device)
    with _evaluating(scorer):
        hidden_NH: Tensor = scorer(batch, Readout(batch.source_N, lambda hidden_NH, _: hidden_NH))
    return hidden_NH


def _probe_ids(scorer: Scorer) -> list[int]:
    return [(7 * i + 1) % scorer.vocabulary for i in range(9)]


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
