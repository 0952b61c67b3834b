"""Whether rows of a model can share prompts: tried once on a few tokens, against the model's own forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from stages.rollouts.model_attention import sampling_attention, windows_seen
from stages.rollouts.room import room_for
from stages.rollouts.rows import Row
from stages.rollouts.shared_rows import SharedRows
from stages.training import linear
from stages.training.attention import UnsupportedAttentionError
from stages.training.probes import obstacle, untold_window

_TOLERANCE, _HALF_TOLERANCE = 1e-3, 5e-2
"""Largest difference of a logit, relative to the largest logit, that reordered sums explain; in 16 bits."""
_known: WeakKeyDictionary[Any, tuple[str | None]] = WeakKeyDictionary()


@torch.no_grad()
def why_not_shared(model: Any) -> str | None:
    """None: rows of this model can share prompts. Asked of a model once; weights may change, its form may not."""
    if model not in _known:
        _known[model] = (obstacle(model) or _difference(model),)
    return _known[model][0]


def _difference(model: Any) -> str | None:
    linear.install(model)
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    ids = [(7 * index + 1) % vocabulary for index in range(9)]
    sequences = [[*ids[:4], *ids[6:8]], [*ids[:4], *ids[7:9]], [*ids[1:4], *ids[6:8]]]
    windows: set[int | None] = set()
    token = windows_seen.set(windows)
    try:
        found = _shared(model, sequences)
    except torch.OutOfMemoryError:
        raise
    except (UnsupportedAttentionError, TypeError, AttributeError, KeyError, RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        windows_seen.reset(token)
    for sequence, logits_V in zip(sequences, found, strict=True):
        own_V = model(input_ids=torch.tensor([sequence], device=model.device), use_cache=False).logits[0, -1]
        if not bool(own_V.isfinite().all()):
            continue  # damaged weights: said where completions are drawn
        difference = float((logits_V - own_V).abs().max() / own_V.abs().max())
        if not difference <= (_TOLERANCE if own_V.itemsize >= 4 else _HALF_TOLERANCE):
            return f"shared prompts change logits by {difference:.2g}"
    return untold_window(model.config.get_text_config(), windows)


def _shared(model: Any, sequences: Sequence[Sequence[int]]) -> Tensor:
    """The logits [3, V] after each sequence; the first two have one prompt."""
    room = room_for(completions=3, per_prompt=1, prompt=4, completion=3)
    prompts = [sequence[:-2] for sequence in sequences]
    rows = [Row(request, 0, prompt, 0, 3) for request, prompt in zip((0, 0, 1), prompts, strict=True)]
    with sampling_attention(model):
        engine = SharedRows(model, room, pad_token_id=0)
        engine.enter(rows)
        tokens = torch.tensor([prompt[-1] for prompt in prompts], device=model.device)
        for place in (-2, -1):
            engine.step(tokens)
            tokens = torch.tensor([sequence[place] for sequence in sequences], device=model.device)
        return engine.step(tokens)[: len(rows)].float()
