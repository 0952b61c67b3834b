"""A loss of each token's own log-probability, and the divergence from a teacher beside it, of one chunk of logits.

N positions, C positions of a chunk, H hidden size, V vocabulary of the student. With p its softmax, y the target and
g = d loss / d logprob, the slopes of the logits are those of the divergence (`divergence_slopes`) and g ([v = y] -
p_v), so that the products are as many as of the divergence alone.
"""

from __future__ import annotations

from torch import Tensor

from stages.losses.distillation import Divergence
from stages.losses.head import ChunkedHead, Head, chunk_length
from stages.losses.linear_divergence import compared, finite, slopes_in_blocks
from stages.losses.token_loss import TokenLossFunction, losses_and_slopes


def linear_divergence_beside(
    hidden_NH: Tensor,
    head: Head,
    targets_N: Tensor,
    token_loss: TokenLossFunction,
    teacher: tuple[Tensor, Head],
    divergence: Divergence,
    *,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum over all positions of divergence and `token_loss`, log-probabilities [N] of the targets, divergences [N]).

    As `linear_divergence` and `linear_token_loss`. `teacher`: its hidden states [N, H] and head. The divergence is over
    the tokens that both heads have; the log-probabilities are over all of the student's.
    """
    teacher_NH, taught = teacher[0].detach(), teacher[1].detached()
    head.check(hidden_NH, targets_N)
    taught.check(teacher_NH, targets_N)
    common = min(head.vocabulary, taught.vocabulary)
    longest = chunk_tokens or chunk_length(head)
    room = ChunkedHead(finite(taught.first(common)), len(hidden_NH), longest)
    logprobs_N, divergences_N = (hidden_NH.new_empty(len(hidden_NH), dtype=head.sum_type) for _ in range(2))

    def compare(part: slice, student_CV: Tensor) -> tuple[Tensor, Tensor]:
        at_C1 = targets_N[part][:, None]
        logprobs_N[part] = student_CV.gather(1, at_C1)[:, 0] - student_CV.logsumexp(1)
        losses_C, slopes_C = losses_and_slopes(token_loss, logprobs_N[part], part)
        probs_CV = student_CV.softmax(1)
        teacher_CV = room.logits(teacher_NH[part])
        divergences_N[part], scales_C = slopes_in_blocks(student_CV[:, :common], teacher_CV, divergence.slope)
        student_CV[:, common:] = 0
        beside_C1 = (slopes_C / scales_C)[:, None]
        student_CV.addcmul_(probs_CV, beside_C1, value=-1)
        student_CV.scatter_(1, at_C1, student_CV.gather(1, at_C1) + beside_C1)
        return divergences_N[part] + losses_C, scales_C

    loss, _ = compared(hidden_NH, head, compare, longest=longest)
    return loss, logprobs_N, divergences_N
