"""The policy as it came, for a reference or a teacher, without a second model where it has adapters.

The policy as it was before its first step is its frozen weights with fresh adapters switched off, or, where an input
adapter is trained on or fresh ones do not start at 0, with that adapter as it came: a copy of it is kept, and put in
its place for a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import Tensor

from stages.adapters import model_source
from stages.context import Context
from stages.training.adapter_settings import APART
from stages.training.adapters import is_adapted
from stages.training.loop import Trainer
from stages.training.model import Scorer
from stages.training.start import frozen_scorer

Reference = Callable[[], AbstractContextManager[Scorer]]
"""`with reference() as scorer:` inside, the scorer computes as the reference."""


def reference_of(context: Context, trainer: Trainer) -> Reference:
    """Input `reference`, or the policy before its first step. To be called before the first step."""
    if context.has("reference"):
        return _frozen(context, trainer, "reference")
    return as_it_came(context, trainer)


def as_it_came(context: Context, trainer: Trainer) -> Reference:
    """The policy before its first step. To be called before it."""
    if trainer.is_whole and is_adapted(trainer.scorer.model):
        fresh = model_source(context, "model").adapter is None and trainer.config.init_lora_weights not in APART
        return switched_off(trainer.scorer) if fresh else put_back(trainer.scorer)
    return _frozen(context, trainer, "model")


def fixed(scorer: Scorer) -> Reference:
    """A model that is always there."""
    return lambda: nullcontext(scorer)


def _frozen(context: Context, trainer: Trainer, name: str) -> Reference:
    frozen = frozen_scorer(context, name, trainer.scorer, bf16=trainer.config.bf16)
    return fixed(frozen.to(trainer.processes.device))


def switched_off(scorer: Scorer) -> Reference:
    """The scorer without its adapters."""

    @contextmanager
    def reference() -> Iterator[Scorer]:
        with scorer.model.disable_adapter():
            yield scorer

    return reference


def put_back(scorer: Scorer) -> Reference:
    """The scorer with its model's trained tensors as they are now."""
    trained = {name: one for name, one in scorer.model.named_parameters() if one.requires_grad}
    kept = {name: one.detach().clone() for name, one in trained.items()}

    @contextmanager
    def reference() -> Iterator[Scorer]:
        present: dict[str, Tensor] = {name: one.data for name, one in trained.items()}
        for name, one in trained.items():
            one.data = kept[name]
        try:
            yield scorer
        finally:
            for name, one in trained.items():
                one.data = present[name]

    return reference
