"""Reward-model losses: one value per pair (B pairs) or per judged step (S steps)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid


def bradley_terry(
    chosen_B: Tensor, rejected_B: Tensor, margin_B: Tensor | None = None, center_coefficient: float = 0.0
) -> Tensor:
    """-log sigmoid(c - r - m) + k (c + r)^2, from the scores of both completions. Returns [B].

    Bradley and Terry 1952; the margin m is Llama 2's (arXiv:2307.09288, eq. 2); the last term keeps the
    scores centred at 0 (Eisenstein et al., arXiv:2312.09244), k = TRL's `center_rewards_coefficient`.
    """
    difference_B = chosen_B - rejected_B
    if margin_B is not None:
        difference_B = difference_B - margin_B
    losses_B = -logsigmoid(difference_B)
    if center_coefficient == 0.0:
        return losses_B
    return losses_B + center_coefficient * (chosen_B + rejected_B).square()


def step_cross_entropy(logits_S2: Tensor, labels_S: Tensor) -> Tensor:
    """-log p(label), p the softmax of a step's two logits (wrong, right). Returns [S].

    The process reward model of Uesato et al., arXiv:2211.14275, sec. 2.3: a binary label after every step.
    """
    return cross_entropy(logits_S2, labels_S.long(), reduction="none")
