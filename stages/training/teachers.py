"""Teachers of a distillation: a model beside the student, or servers of vLLM that send its likeliest tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import compress
from threading import Lock
from typing import Any, Protocol

import torch
from torch import Tensor

from artifacts.errors import StageError
from stages.adapters import model_source
from stages.losses.head import Head, chunk_length, parts_of
from stages.losses.host_numbers import on_device
from stages.losses.top_divergence import TopTokens, top_tokens
from stages.rollouts.engine import ServedModel
from stages.rollouts.engine_settings import EngineConfig
from stages.rollouts.requests import Completion, SampleRequest, SamplingConfig
from stages.rollouts.vllm_client import ServerEngine
from stages.rollouts.vllm_scoring import Likely
from stages.training.answers_ahead import Answered
from stages.training.batch import Group, TokenBatch
from stages.training.distillation import teacher_hidden
from stages.training.engine_sync import TEACHER, open_engine, send_weights
from stages.training.frozen_engine import reads_the_folder
from stages.training.loop import Trainer
from stages.training.model import Scorer
from stages.training.out_of_memory import TokenBudget
from stages.training.sampled_distillation import Told
from stages.training.start import frozen_scorer
from stages.training.sync_proof import SyncProof


class Teacher(Protocol):
    """What the stage needs of a teacher, beside what its objective asks."""

    @property
    def scorer(self) -> Scorer | None:
        """The model, where it is in this process."""
        ...

    @property
    def vocabulary(self) -> int | None:
        """How many tokens its head has; None: its servers do not say."""
        ...

    def join(self, trainer: Trainer) -> None:
        """Be ready for the trainer's first batch. Collective."""
        ...

    def taught(self, dataset: str, groups: list[Group]) -> list[Group]:
        """The rows of this input, with what it needs to teach them. Raises StageError where it cannot."""
        ...


class LocalTeacher:
    """A model beside the student."""

    def __init__(self, scorer: Scorer, most: int | None, temperature: float) -> None:
        """`most`: how many likely tokens it tells; None: nobody asks it for them."""
        self.scorer, self.most, self.temperature = scorer, most, temperature
        self.vocabulary = scorer.vocabulary

    def join(self, trainer: Trainer) -> None:
        """On the trainer's device, with rows laid out as the student's, of whose tokens alone it tells."""
        self.vocabulary = min(self.vocabulary, trainer.scorer.vocabulary)
        share = trainer.scorer.share_prefixes and self.scorer.share_prefixes
        trainer.scorer.share_prefixes = self.scorer.share_prefixes = share
        self.scorer.to(trainer.accelerator.device)

    def taught(self, dataset: str, groups: list[Group]) -> list[Group]:
        """It needs nothing."""
        return groups

    def hidden(self, batch: TokenBatch) -> Tensor:
        """Of a batch, computed now. Raises StageError for tokens that it does not know."""
        _require_known(batch, self.scorer.vocabulary)
        return teacher_hidden(self.scorer, batch)

    def head(self) -> Head:
        """The model's."""
        return self.scorer.head(self.temperature).detached().first(self.vocabulary)

    def __call__(self, batch: TokenBatch) -> TopTokens:
        """Of a batch."""
        assert self.most is not None
        return likeliest(self.hidden(batch), self.head(), self.most)


def _require_known(batch: TokenBatch, vocabulary: int) -> None:
    """What fills up a student's head beyond the teacher's may be sampled, and the teacher cannot even read it."""
    for group in batch.groups:
        highest = max((max(branch.token_ids, default=0) for branch in group.branches), default=0)
        if highest >= vocabulary:
            raise StageError(
                f"a completion of row {group.row_id} has token {highest}, the teacher knows {vocabulary}: the "
                "student's head has more than any tokenizer knows; resize the student's embedding to the teacher's size"
            )


@torch.no_grad()
def likeliest(hidden_NH: Tensor, head: Head, most: int) -> TopTokens:
    """The `most` likeliest tokens by hidden states and head, a chunk of positions at a time."""
    parts = parts_of(len(hidden_NH), chunk_length(head))
    found = [top_tokens(head.logits(hidden_NH[part]), most) for part in parts]
    return TopTokens(torch.cat([one.ids_NK for one in found]), torch.cat([one.logs_NK for one in found]))


class ServedTeacher:
    """Servers of vLLM with a model of input `teacher`."""

    scorer, vocabulary = None, None

    def __init__(self, most: int | None, name: str, number: int | None = None) -> None:
        """`most`: how many likely tokens they tell; None: nobody asks them for these. `name`: the input, of several
        teachers (`number`) an entry of it."""
        self.most, self.name, self.number = most, name, number
        self._engine: ServerEngine | None = None
        self._vocabulary = 0
        self._turn = Lock()

    def join(self, trainer: Trainer) -> None:
        """Start or reach them, and have them take the teacher's weights."""
        context = trainer.context
        config: Any = context.config
        settings: EngineConfig = config.engine_of(self.number or 0)
        role = TEACHER if self.number is None else f"{TEACHER}-{self.number}"
        source, dtype = model_source(context, self.name), settings.computes_in(config.bf16)
        self._vocabulary = trainer.scorer.vocabulary
        served = ServedModel(source.folder, source.tokenizer, dtype, self._vocabulary, (), config.seed)
        engine = open_engine(context, trainer.processes, settings, served, role)
        assert isinstance(engine, ServerEngine), "the stage's check lets no other be a teacher"
        if source.adapter is not None or not reads_the_folder(settings):
            scorer = frozen_scorer(context, self.name, bf16=config.bf16).to(trainer.accelerator.device)
            send_weights(engine, trainer.processes, scorer, settings)
            budget = TokenBudget(context, config.micro_batch_tokens)
            dtypes = (dtype, "bfloat16" if config.bf16 else "float32")
            _prove(SyncProof(engine, budget, tolerance=settings.tolerance(config.bf16), dtypes=dtypes), scorer)
        self._engine = engine

    def taught(self, dataset: str, groups: list[Group]) -> list[Group]:
        """It needs nothing."""
        return groups

    def __call__(self, batch: TokenBatch) -> TopTokens:
        """Of a batch. Raises StageError for tokens that the student does not know."""
        told = iter(self._tell([group for group in batch.groups if not isinstance(group.data, Answered)]))
        said = [group.data.said if isinstance(group.data, Answered) else next(told) for group in batch.groups]
        device = batch.source_N.device
        ids_NK, logs_NK = torch.cat([one.ids_NK for one in said]), torch.cat([one.logs_NK for one in said])
        return TopTokens(ids_NK.to(device), logs_NK.to(device))

    def foretell(self, groups: Sequence[Group]) -> list[TopTokens | None]:
        """Of groups, on the host, by any thread; another one that asks waits for its turn."""
        return list(self._tell(groups))

    def answered(self, group: Group, said: TopTokens) -> Group:
        """The group with what it said of it."""
        return replace(group, data=Answered(group.data, said))

    def _tell(self, groups: Sequence[Group]) -> list[TopTokens]:
        """Of each group."""
        assert self._engine is not None and self.most is not None
        asked = [list(_asked(group)) for group in groups]
        pairs = [(before, after) for branches in asked for before, after, _ in branches]
        with self._turn:
            answers = iter(self._engine.top_logprobs(pairs, self.most) if pairs else ())
        return [
            self._tokens([place for _, _, mask in branches for place in compress(next(answers), mask)])
            for branches in asked
        ]

    def _tokens(self, places: Sequence[Likely]) -> TopTokens:
        assert self.most is not None
        ids_NK = torch.tensor([[token for token, _ in place] for place in places], dtype=torch.long)
        logs_NK = torch.tensor([[value for _, value in place] for place in places])
        ids_NK, logs_NK = ids_NK.reshape(len(places), self.most), logs_NK.reshape(len(places), self.most)
        if places and not (0 <= int(ids_NK.min()) <= int(ids_NK.max()) < self._vocabulary):
            raise StageError(
                f"the teacher's servers name token {int(ids_NK.max())}, the student knows {self._vocabulary}: their "
                "vocabularies differ"
            )
        return TopTokens(ids_NK, logs_NK)

    def tell(self, batch: TokenBatch) -> Told:
        """Of a batch's tokens themselves, one number each."""
        assert self._engine is not None
        asked = [branch for group in batch.groups for branch in _asked(group)]
        with self._turn:
            answers = self._engine.plain_logprobs([(before, after) for before, after, _ in asked])
        values = [
            value for answer, (_, _, mask) in zip(answers, asked, strict=True) for value in compress(answer, mask)
        ]
        return Told(on_device(values, batch.source_N.device))


def _asked(group: Group) -> Iterator[tuple[list[int], list[int], list[bool]]]:
    """(what comes before the first asked-for token, what follows, which of that is asked for), branch by branch."""
    prefix = list(group.prefix_ids if group.data is None else group.data)
    for branch in group.branches:
        tokens = list(branch.token_ids)
        mask = [True] * len(tokens) if branch.loss_mask is None else [bool(one) for one in branch.loss_mask]
        first = mask.index(True) if any(mask) else len(mask)
        if first < len(tokens):
            yield prefix + tokens[:first], tokens[first:], mask[first:]


def _prove(proof: SyncProof, scorer: Scorer) -> None:
    """Both say the same of some tokens: the weights have arrived."""
    tokens = [number % scorer.vocabulary for number in range(1, 33)]
    request = SampleRequest(tokens[:4], (0,), "probe")
    said = Completion(tokens[4:], [0.0] * 28, finished=True)
    # as if something were left out, so that both are asked for the model's own distribution
    proof(scorer, [request], [[said]], SamplingConfig.model_validate({"top_k": 1}))
