"""The load-balancing loss of a mixture of experts, beside the loss of any objective.

What is added is the mean over the sequences of a step (branches with their prefix; a prompt counts in each of them, as
in rows of their own), times the coefficient. Every sequence has a loss of its own, as in DeepSeek-V3's sequence-wise
balance (arXiv:2412.19437, eq. 17 to 20): f, which the gradient of p is multiplied by, is then known as soon as the
sequence is computed. So one pass is exact, and neither micro-batches nor processes nor packing change it. transformers
and TRL take f and p over a micro-batch instead, where the result hangs on how a step is cut; one sequence a micro-batch
is what is here. Taken over a step as a whole, it would need a pass of its own for f.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from artifacts.errors import StageError
from stages.context import Context
from stages.losses.router import load_balance, max_load
from stages.training.batch import Branch, Group, TokenBatch, layout
from stages.training.metrics import Mean, MetricSums
from stages.training.model import Scorer
from stages.training.objective import Forward, Objective, Readout
from stages.training.sequence_totals import SequenceTotals
from stages.training.trunk import trunk_of

AUX_LOSS, MAX_LOAD = "aux_loss", "router/max_load"
_LOADS = "router/loads"
_SETTING = "router_aux_loss_coef"
_TOLERANCE = 1e-3
"""Largest relative difference of the loss that float32 sums explain."""


@dataclass(frozen=True)
class RouterBalance:
    """The loss of a model's routers."""

    coefficient: float
    top_k: int
    """Experts of a token."""
    layers: int
    """Those with a router."""
    experts: int

    def beside(
        self, objective: Objective, forward: Forward, batch: TokenBatch
    ) -> tuple[Tensor, dict[str, Mean], Tensor]:
        """(the objective's loss, its metrics with `aux_loss`, the loss of the batch's sequences, summed, times the
        coefficient)."""
        listening = _Listening(forward, self.top_k)
        loss, metrics = objective(listening, batch)
        assert listening.heard is not None, "objectives make one forward pass over their batch"
        losses_K, loads_LE = listening.heard
        found = {AUX_LOSS: Mean(losses_K.sum(), len(losses_K)), _LOADS: Mean(loads_LE, 0)}
        return loss, {**metrics, **found}, losses_K.sum() * self.coefficient

    def loads(self, sums: MetricSums, device: torch.device) -> Tensor:
        """[L x E] tokens of a step's passes in this process, by expert; zeros where there was none."""
        loads_LE = sums.computed.get(_LOADS, (None, None))[0]
        if loads_LE is None:
            return torch.zeros(self.layers * self.experts, dtype=torch.float64, device=device)
        return loads_LE.flatten()

    def max_load(self, loads: Sequence[float]) -> dict[str, float]:
        """Metric `router/max_load` of a step, from `loads` summed over processes."""
        loads_LE = torch.tensor(loads, dtype=torch.float64).reshape(self.layers, self.experts)
        return {MAX_LOAD: max_load(loads_LE)} if loads_LE.sum() else {}


class _Listening:
    """A forward pass that hears of its routers too."""

    def __init__(self, forward: Forward, top_k: int) -> None:
        self.forward, self.top_k = forward, top_k
        self.heard: tuple[Tensor, Tensor] | None = None

    def __call__(self, batch: TokenBatch, readout: Readout) -> Any:
        assert self.heard is None, "objectives make one forward pass over their batch"
        result, self.heard = self.forward(batch, replace(readout, of_routers=balance_in(batch, self.top_k)))
        return result


def balance_in(batch: TokenBatch, top_k: int) -> Callable[[Sequence[Tensor]], tuple[Tensor, Tensor]]:
    """`load_balance` of the batch's sequences, as a Readout takes it."""
    totals = SequenceTotals(batch)
    return partial(load_balance, top_k=top_k, totals=totals, tokens_K=totals.tokens_K)


def balance_of(context: Context, scorer: Scorer, coefficient: float | None) -> RouterBalance | None:
    """What setting `router_aux_loss_coef` asks for; None: nothing is added. Without a setting the model's
    configuration decides, as it does in transformers: by `output_router_logits`, with its own coefficient. (TRL adds
    that whatever the configuration asks for: 0.9 with gpt-oss as it is published.)

    Raises StageError where a coefficient is given for a model without one, or where the model's own differs from ours.
    """
    model = scorer.transformers_model
    settings = model.config.get_text_config()
    if coefficient == 0:
        return None
    own = getattr(settings, _SETTING, None)
    asked = coefficient if coefficient is not None else own
    if not asked or not hasattr(settings, "output_router_logits"):
        if coefficient is not None:
            raise StageError(_refusal(model, coefficient, "it has no router"))
        return None
    if coefficient is None and not settings.output_router_logits:
        context.log(
            f"no load-balancing loss is added: the model's configuration names {_SETTING} {own:g}, but its "
            f"output_router_logits is false; to add it, give {_SETTING}"
        )
        return None
    found = _probe(scorer)
    if found is None:
        reason = "its class computes no auxiliary loss of its routers, or it has no experts"
        if coefficient is not None:
            raise StageError(_refusal(model, coefficient, reason))
        context.log(f"{_SETTING} {asked:g} of the model's configuration is not used: {reason}")
        return None
    source = "" if coefficient is not None else " of the model's configuration"
    context.log(f"the load-balancing loss of {found.layers} routers is added, times {_SETTING} {asked:g}{source}")
    return replace(found, coefficient=float(asked))


def _refusal(model: Any, coefficient: float, reason: str) -> str:
    kind = f"{model.config.get_text_config().model_type} ({type(model).__name__})"
    return f"{_SETTING} is {coefficient:g}, but input model is a {kind}: {reason}; leave the setting out"


@torch.no_grad()
def _probe(scorer: Scorer) -> RouterBalance | None:
    """By a short row; None: the model's class says no auxiliary loss. Raises StageError where it is another one."""
    model, was_training = scorer.transformers_model, scorer.training
    ids = [(7 * place + 1) % scorer.vocabulary for place in range(9)]
    inputs = {"input_ids": torch.tensor([ids], device=scorer.device), "output_router_logits": True}
    scorer.eval()
    # a dense model of such a class fails at its own loss of no routers
    routers = trunk_of(model)(**inputs).get("router_logits")
    output = model(**inputs) if routers else {}
    scorer.train(was_training)
    own, logits = output.get(AUX_LOSS), output.get("router_logits")
    if not isinstance(own, Tensor) or not logits:
        return None
    batch = layout([Group("probe", (), (Branch(ids, [False] * len(ids)),))], share_prefixes=False).to(scorer.device)
    settings = model.config.get_text_config()  # what multimodal classes go by
    top_k = int(getattr(model, "num_experts_per_tok", None) or settings.num_experts_per_tok)
    ours = float(balance_in(batch, top_k)(logits)[0])
    if abs(ours - float(own)) > _TOLERANCE * abs(float(own)):
        raise StageError(
            f"{type(model).__name__}: its own auxiliary loss of a short row is {float(own):.6g}, ours is {ours:.6g}; "
            f"what it does to its routers is not supported: set {_SETTING} to 0 to train without it"
        )
    return RouterBalance(0.0, top_k, len(logits), logits[0].shape[-1])
