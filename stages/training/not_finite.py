"""What is said of a step whose loss or gradient is not a number: which rows it came from."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NoReturn

from artifacts.errors import StageError
from stages.training.batch import Group
from stages.training.objective import Window

if TYPE_CHECKING:
    from stages.training.loop import Trainer

_NAMED = 8
"""Rows that a message names at most."""


def stop_on_nan(trainer: Trainer, step: int, window: Window, loss: float, grad_norm: float) -> NoReturn:
    """Find the rows by computing them one by one, on every process, and stop before the weights are touched."""
    trainer.scorer.eval()
    trainer.parallel.discard()
    culprits = [group.row_id for group in window.groups if not _is_finite(trainer, group)]
    rows = f"rows {', '.join(culprits[:_NAMED])}" if culprits else "no row alone (their sum overflowed)"
    if len(culprits) > _NAMED:
        rows += f" and {len(culprits) - _NAMED} more"
    trainer.saver.background.wait()
    saved = trainer.context.checkpoints.latest_step()
    kept = "no checkpoint was saved before" if saved is None else f"the last checkpoint is of step {saved}"
    raise StageError(
        f"step {step + 1}: loss {loss}, gradient norm {grad_norm}; {rows}. This step changed no weights, and "
        f"{kept}; lower learning_rate or look at these rows"
    )


def _is_finite(trainer: Trainer, group: Group) -> bool:
    """Whether loss and gradient of the group alone are numbers."""
    loss, _ = trainer.objective(trainer.parallel.forward, trainer.scorer.layout([group]))
    if not math.isfinite(float(loss.detach())):
        return False
    if not loss.requires_grad:
        return True
    trainer.parallel.backward(loss, last=True)
    norm = float(trainer.parallel.gradient_norm())
    trainer.parallel.discard()
    return math.isfinite(norm)
