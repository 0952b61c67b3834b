"""A language model that also says what is to be expected: a value of every position, for PPO.

The values are those of a head on the policy's own last hidden states, or of a model of their own beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from artifacts.errors import StageError
from stages.adapters import ModelSource
from stages.context import Context
from stages.data.tokenize import TokenizedPrompt
from stages.disk import require_disk
from stages.losses.logprobs import TokenScores
from stages.losses.token_loss import TokenLossFunction, linear_token_loss
from stages.training.batch import TokenBatch
from stages.training.classifiers import load_value_model, padding_of
from stages.training.dropout import without_dropout
from stages.training.export import write_merged
from stages.training.loop import Trained
from stages.training.model import Scorer, head_scores, load_tokenizer, token_logprobs
from stages.training.objective import Readout
from stages.training.start import tokenizer_of
from stages.training.value_settings import VALUE_MODEL


class ActorCritic(Scorer):
    """A policy whose last hidden states are also read by a linear value head, which is no part of the exported model.

    The head starts at zero: nothing is expected of any position yet, and no random number decides which.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.value_head = nn.Linear(int(self.transformers_model.config.get_text_config().hidden_size), 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def values(self, hidden_NH: Tensor, batch: TokenBatch) -> Tensor:
        """[N] of the positions with these hidden states."""
        values_N1: Tensor = self.value_head(hidden_NH.to(self.value_head.weight.dtype))
        return values_N1[:, 0].float()


class PolicyAndValueModel(Scorer):
    """A policy, and a value model that sees the same rows, laid out in the same way: prompts once, no padding."""

    def __init__(self, model: Any, value_model: Any) -> None:
        super().__init__(model)
        self.value_model = Scorer(value_model)

    def values(self, hidden_NH: Tensor, batch: TokenBatch) -> Tensor:
        """[N] of the positions that the policy was read at; its hidden states do not matter."""
        values_N: Tensor = self.value_model(batch, Readout(batch.source_N, head_scores))
        return values_N


ValuedPolicy = ActorCritic | PolicyAndValueModel


def valued_policy_of(context: Context) -> Callable[[Any], Scorer]:
    """Policy -> it with its values: of input `value_model` where one is wired in, else of a head on its own trunk.

    Raises StageError where the value model has another tokenizer: it is given the policy's tokens.
    """
    if not context.has(VALUE_MODEL):
        return ActorCritic
    folder = context.input(VALUE_MODEL)
    tokenizer = load_tokenizer(folder)
    theirs, ours = tokenizer.get_vocab(), tokenizer_of(context, "model").get_vocab()
    if theirs != ours:
        different = sorted(set(ours.items()) ^ set(theirs.items()))[:3]
        raise StageError(
            f"input {VALUE_MODEL} has another tokenizer than the policy ({len(theirs)} and {len(ours)} tokens; for "
            f"example {different}). It says a value of every token of the policy's, so it needs the same one: train "
            "the reward model from the policy's base, or leave the input out for a value head on the policy"
        )

    def build(policy: Any) -> Scorer:
        value_model = load_value_model(folder)
        without_dropout(value_model)
        value_model.config.get_text_config().pad_token_id = padding_of(tokenizer)
        scorer = PolicyAndValueModel(policy, value_model)
        known = scorer.value_model.vocabulary
        if known < scorer.vocabulary:
            raise StageError(
                f"input {VALUE_MODEL} has embeddings of {known} token ids, the policy can sample {scorer.vocabulary}: "
                "for some there would be no value; take a value model with as many"
            )
        return scorer

    return build


def require_room(scorer: Scorer, prompts: Sequence[TokenizedPrompt], max_completion_length: int) -> None:
    """Raises StageError where a prompt with its completion is longer than the value model takes."""
    if not prompts or not isinstance(scorer, PolicyAndValueModel):
        return
    room = scorer.value_model.context_length - max_completion_length
    longest = max(prompts, key=lambda prompt: len(prompt.prompt_ids))
    if (tokens := len(longest.prompt_ids)) > room:
        raise StageError(
            f"row {longest.row_id}: a prompt of {tokens} tokens and a completion of {max_completion_length} come to "
            f"{tokens + max_completion_length}, input {VALUE_MODEL} takes {scorer.value_model.context_length}; "
            + (f"lower max_length to {room}, or " if room > 1 else "")
            + "lower max_completion_length, or take a value model with a longer context"
        )


def export_value_model(context: Context, trained: Trained) -> None:
    """Write output `value_model`, in the form of a reward model."""
    if not context.is_main:
        return
    assert isinstance(trained.scorer, PolicyAndValueModel)
    folder, model = context.output(VALUE_MODEL), trained.scorer.value_model.transformers_model
    require_disk(folder, int(sum(one.nbytes for one in model.parameters()) * 1.05) + 1_000_000, "the value model")
    write_merged(model, ModelSource(context.input(VALUE_MODEL)), folder)


def logprobs_and_values(batch: TokenBatch, *, temperature: float) -> Readout:
    """A readout: (TokenScores of the asked-for tokens, values [N] of the positions before them)."""
    logprobs = token_logprobs(batch, temperature=temperature)

    def read(hidden_NH: Tensor, scorer: nn.Module) -> tuple[TokenScores, Tensor]:
        assert isinstance(scorer, ValuedPolicy)
        return logprobs.read(hidden_NH, scorer), scorer.values(hidden_NH, batch)

    return Readout(batch.source_N, read)


def policy_loss_and_values(batch: TokenBatch, token_loss: TokenLossFunction, *, temperature: float) -> Readout:
    """A readout: (sum of `token_loss`, TokenScores without a gradient, values [N] with one)."""

    def read(hidden_NH: Tensor, scorer: nn.Module) -> tuple[Tensor, TokenScores, Tensor]:
        assert isinstance(scorer, ValuedPolicy)
        loss, scores = linear_token_loss(hidden_NH, scorer.head(temperature), batch.target_N, token_loss)
        return loss, scores, scorer.values(hidden_NH, batch)

    return Readout(batch.source_N, read)


def per_branch(batch: TokenBatch, values_N: Tensor) -> list[list[float]]:
    """The values of every branch's asked-for tokens."""
    return [part.tolist() for part in values_N.cpu().split(batch.counts)]
