"""The proof that an engine has the trainer's weights: what it lets pass, and what it says of what it does not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from artifacts.errors import StageError
from stages.context import local_context
from stages.rollouts.engine_settings import EngineConfig
from stages.rollouts.requests import Completion, SampleRequest, SamplingConfig
from stages.training.engine_sync import SyncedEngine, send_weights
from stages.training.loop import Trainer
from stages.training.model import Scorer
from stages.training.out_of_memory import TokenBudget
from stages.training.processes import Processes
from stages.training.sync_proof import SyncProof

SETTINGS = SamplingConfig(max_completion_length=4, temperature=0.5)
REQUESTS = [SampleRequest([3, 4, 5], (0, 1), "r7"), SampleRequest([6], (2, 3), "r8")]
TOKENS = [[[8, 9, 1], [2]], [[7, 7, 7, 7], []]]


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    torch.manual_seed(1)
    sizes: dict[str, Any] = {"vocab_size": 17, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2, initializer_range=0.5, tie_word_embeddings=True)
    return Scorer(LlamaForCausalLM(config).eval())


def logprobs(scorer: Scorer, prompt: Sequence[int], tokens: Sequence[int], temperature: float) -> list[float]:
    if not tokens:
        return []
    with torch.no_grad():
        logits = scorer.transformers_model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()


class Fake:
    """An engine whose log-probabilities are right but for `error` at one token, or `everywhere`."""

    def __init__(self, scorer: Scorer, error: float = 0.0, everywhere: float = 0.0) -> None:
        self.scorer, self.error, self.everywhere = scorer, error, everywhere
        self.loads, self.asked_plain, self.rests = 0, 0, False

    def load(self, weights: Any) -> None:
        self.loads += 1
        assert any(name == "lm_head.weight" for name, _ in weights)

    def sample(self, requests: Any, settings: SamplingConfig, on_progress: Any = None) -> list[list[Completion]]:
        return [
            [Completion(tokens, self._changed(request, tokens, settings.temperature), True) for tokens in group]
            for request, group in zip(requests, TOKENS, strict=True)
        ]

    def plain_logprobs(self, sequences: Any) -> list[list[float]]:
        self.asked_plain += 1
        return [logprobs(self.scorer, *sequence, 1.0) for sequence in sequences]

    def rest(self) -> bool:
        return self.rests

    def close(self) -> None:
        raise AssertionError("whoever opened it closes it")

    def _changed(self, request: SampleRequest, tokens: Sequence[int], temperature: float) -> list[float]:
        found = [value + self.everywhere for value in logprobs(self.scorer, request.prompt_ids, tokens, temperature)]
        if request.row_id == "r8" and tokens:
            found[2] += self.error
        return found


def proof_of(engine: Any, tmp_path: Path) -> SyncProof:
    budget = TokenBudget(local_context("sft", {}, folder=tmp_path), 64)
    return SyncProof(engine, budget, tolerance=1e-3, dtypes=("bfloat16", "float32"))


MESSAGES = [
    ({"error": 2e-3}, r"token 7, number 3 of a completion of row r8, .* by 0.001, and do by 0.00025 on average"),
    ({"error": 2e-3}, r"likely rounding: the engine computes in bfloat16, the trainer in float32; give rollouts.dtype"),
    ({"everywhere": -0.4}, r"the sync did not reach the engine, .*it never held before.*may have kept the old head"),
    ({"error": float("nan")}, r"A number of the engine's is not finite"),
]


@pytest.mark.parametrize(("wrong", "message"), MESSAGES)
def test_names_the_worst_token_and_the_likely_cause(
    wrong: dict[str, float], message: str, scorer: Scorer, tmp_path: Path
) -> None:
    engine = Fake(scorer, **wrong)
    with pytest.raises(StageError, match=message):
        proof_of(engine, tmp_path)(scorer, REQUESTS, engine.sample(REQUESTS, SETTINGS), SETTINGS)


def test_lets_rounding_pass(scorer: Scorer, tmp_path: Path) -> None:
    engine = Fake(scorer, error=9e-4)
    proof = proof_of(engine, tmp_path)
    proof(scorer, REQUESTS, engine.sample(REQUESTS, SETTINGS), SETTINGS)
    assert (proof.passed, engine.asked_plain) == (1, 0)
    # of a cut distribution nothing of what it sampled with compares
    cut = SamplingConfig(max_completion_length=4, temperature=0.5, top_p=0.5)
    proof(scorer, REQUESTS, Fake(scorer, everywhere=3.0).sample(REQUESTS, cut), cut)
    assert (proof.passed, engine.asked_plain) == (2, 1)


def test_weights_are_sent_when_they_have_changed_and_proved_at_every_nth_sync(scorer: Scorer, tmp_path: Path) -> None:
    engine, version = Fake(scorer), [0]
    proof = proof_of(engine, tmp_path)
    synced = SyncedEngine(
        engine,
        proof,
        lambda engine, scorer: send_weights(engine, Processes(0, 1, torch.device("cpu")), scorer, EngineConfig()),
        policy=lambda: scorer,
        version=lambda: version[0],
        interval=3,
    )
    seen = []
    for step in (0, 0, 1, 2, 3, 3):  # twice: groups that replace others are of the same weights
        version[0] = step
        made = synced.sample(REQUESTS, SETTINGS)
        assert [one.weight_versions for group in made for one in group] == [
            [step] * len(tokens) for group in TOKENS for tokens in group
        ]
        seen.append((engine.loads, proof.passed))
    assert seen == [(1, 1), (1, 1), (2, 1), (3, 1), (4, 2), (4, 2)]
    trainer: Any = SimpleNamespace(steps_done=3, averaging=SimpleNamespace(is_in_place=True))
    version[0] = Trainer.weights_version.__get__(trainer)  # held-out prompts are completed by averaged weights
    synced.sample(REQUESTS, SETTINGS)
    trainer.averaging.is_in_place = False
    version[0] = Trainer.weights_version.__get__(trainer)
    synced.sample(REQUESTS, SETTINGS)
    assert engine.loads == 6
    engine.rests = True  # what sleeps has lost its weights
    synced.sample(REQUESTS, SETTINGS)
    synced.sample(REQUESTS, SETTINGS)
    assert engine.loads == 7
