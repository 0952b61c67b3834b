"""Out of memory: the same gradient, metrics and fingerprint with smaller micro-batches, or an error that says why."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from artifacts.errors import OutOfMemory, StageError
from flows.command import stage_variables
from stages.context import Context
from stages.training.batch import Branch, Group, TokenBatch
from stages.training.classifiers import load_reward_model
from stages.training.language_modeling import TokenLoss
from stages.training.loop import Trainer
from stages.training.model import Scorer
from stages.training.out_of_memory import TokenBudget, is_out_of_memory
from stages.training.processes import prepare_process
from stages.training.reference import branch_logprobs
from stages.training.reward_scoring import score_branches
from stages.training.windows import DatasetWindows
from tests.training.conftest import random_groups, tiny_model
from tests.training.test_loop import context_for, sequences


def of_the_cpu() -> None:
    """What torch's CPU allocator raises for more than any machine has."""
    torch.empty(2**60, dtype=torch.uint8)


def of_cuda() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...\nmore lines")


def of_python() -> None:
    bytearray(2**62)


class Limited(TokenLoss):
    """The loss, on a machine whose memory ends at so many tokens: in the forward or in the backward pass."""

    def __init__(self, tokens: int, fault: Callable[[], None], *, backward: bool = False) -> None:
        super().__init__()
        self.tokens, self.fault, self.backward = tokens, fault, backward
        self.seen: list[int] = []
        self.held: list[weakref.ref[torch.Tensor]] = []

    def __call__(self, forward: Any, batch: TokenBatch) -> Any:
        self.seen.append(batch.num_tokens)
        loss, metrics = super().__call__(forward, batch)
        if batch.num_tokens > self.tokens:
            self.held.append(weakref.ref(loss))
            if not self.backward:
                self.fault()
            loss.register_hook(lambda _: self.fault())
        return loss, metrics


def train(context: Context, groups: list[Group], objective: TokenLoss) -> tuple[Scorer, list[dict[str, float]]]:
    scorer = Scorer(tiny_model())
    trainer = Trainer(context, context.config, prepare_process(context), scorer, objective)
    return scorer, trainer.run(DatasetWindows(groups, context.config)).metrics


def events_of(context: Context, kind: str) -> list[dict[str, Any]]:
    lines = (Path(context.spec.job) / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


@pytest.mark.parametrize("fault", [of_the_cpu, of_cuda, of_python])
def test_allocators_give_up_in_words_that_are_known(fault: Callable[[], None]) -> None:
    with pytest.raises(Exception) as caught:
        fault()
    assert is_out_of_memory(caught.value)


def test_other_errors_are_not_taken_for_it() -> None:
    assert not any(map(is_out_of_memory, [RuntimeError("shape mismatch"), ValueError("out of memory"), OSError(12)]))


@pytest.mark.parametrize(("fault", "backward"), [(of_the_cpu, False), (of_the_cpu, True), (of_cuda, True)])
def test_the_run_is_that_of_the_small_budget(tmp_path: Path, fault: Callable[[], None], backward: bool) -> None:
    """Losses, gradient norms, metrics and weights of every step against a run that had the small budget at once."""
    groups = sequences()
    objective = Limited(12, fault, backward=backward)
    context = context_for(tmp_path / "a", micro_batch_tokens=10_000)
    harmed, metrics = train(context, groups, objective)
    small = max(tokens for tokens in objective.seen if tokens <= 12)
    unharmed_context = context_for(tmp_path / "b", micro_batch_tokens=small)
    unharmed, expected = train(unharmed_context, groups, TokenLoss())

    assert max(objective.seen) > 12 and len(metrics) == len(expected) == 6
    for ours, theirs in zip(metrics, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    for left, right in zip(harmed.parameters(), unharmed.parameters(), strict=True):
        torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)
    assert context.fingerprint == unharmed_context.fingerprint
    # what failed once is not tried again
    too_large = [tokens for tokens in objective.seen if tokens > 12]
    assert too_large == sorted(too_large, reverse=True)


def test_the_log_says_what_happened(tmp_path: Path) -> None:
    context = context_for(tmp_path, micro_batch_tokens=10_000, max_steps=1)
    objective = Limited(20, of_the_cpu)
    train(context, sequences(), objective)
    (said,) = [event["text"] for event in events_of(context, "log")]
    first = objective.seen[0]
    assert said.startswith(
        f"out of memory on a micro-batch of 8 rows, {first} tokens: micro_batch_tokens 10,000 -> {first // 2}, and the "
        "same work again"
    )
    assert "can't allocate memory" in said and "dropout" in said
    begun = [event["tokens"] for event in events_of(context, "micro_batch")]
    assert begun[0] == first and max(begun[1:]) <= first // 2


def test_nothing_of_the_failed_attempt_is_kept(tmp_path: Path) -> None:
    objective = Limited(20, of_cuda, backward=True)
    context = context_for(tmp_path, max_steps=1)
    scorer = Scorer(tiny_model())
    trainer = Trainer(context, context.config, prepare_process(context), scorer, objective)

    def check() -> None:
        gc.collect()
        assert objective.held and all(loss() is None for loss in objective.held)

    drop, trainer.parallel.discard = trainer.parallel.discard, lambda: (check(), drop())  # type: ignore[method-assign,func-returns-value]
    trainer.run(DatasetWindows(sequences(), context.config))


def test_a_row_alone_cannot_be_split(tmp_path: Path) -> None:
    groups = sequences()
    long = Group("long", (), (Branch([5] * 20, [False] + [True] * 19),))
    with pytest.raises(StageError) as caught:
        train(context_for(tmp_path, train_batch_size=13), [*groups, long], Limited(19, of_the_cpu))
    assert not isinstance(caught.value, OutOfMemory)
    said = str(caught.value)
    assert said.startswith("out of memory on row long alone: its 20 tokens need more memory than there is")
    assert all(remedy in said for remedy in ("max_length", "gradient_checkpointing", "lora_r", "processes"))


def test_one_of_several_processes_asks_to_be_started_again(tmp_path: Path) -> None:
    """It cannot repeat a step by itself: the others wait for it in the exchange of gradients."""
    budget = TokenBudget(context_for(tmp_path), 8192)
    groups = sequences()[:4]

    def attempt(_: int) -> None:
        with budget.micro_batch(groups):
            of_the_cpu()

    with pytest.raises(OutOfMemory, match="start the stage again with micro_batch_tokens") as caught:
        budget.fit(attempt, alone=False)
    assert caught.value.micro_batch_tokens == sum(group.length for group in groups) // 2


def test_passes_without_gradients_halve_too_and_compute_nothing_twice(tmp_path: Path) -> None:
    groups = random_groups(12, 3)
    scorer = Scorer(tiny_model())
    context = context_for(tmp_path)
    expected = branch_logprobs(scorer, groups, TokenBudget(context, 20))
    with limited(scorer, 60) as computed:
        budget = TokenBudget(context, 10_000)
        found = branch_logprobs(scorer, groups, budget)
    assert budget.tokens < 60 and sorted(computed) == sorted(group.row_id for group in groups)
    for ours, theirs in zip(found, expected, strict=True):
        for (values, total), (others, sum_of_others) in zip(ours, theirs, strict=True):
            assert values == pytest.approx(others, abs=1e-5) and total == pytest.approx(sum_of_others, abs=1e-5)

    tiny_model().save_pretrained(tmp_path / "model-folder")
    judge = Scorer(load_reward_model(tmp_path / "model-folder", new_head_seed=3).eval())
    rewards = score_branches(judge, groups, TokenBudget(context, 20))
    with limited(judge, 60):
        for ours, theirs in zip(score_branches(judge, groups, TokenBudget(context, 10_000)), rewards, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5)


class limited:
    """Inside, a forward pass of the scorer over more tokens runs out of memory; gives the rows of those that ran."""

    def __init__(self, scorer: Scorer, tokens: int) -> None:
        self.scorer, self.tokens = scorer, tokens
        self.computed: list[str] = []

    def __enter__(self) -> list[str]:
        def before(_: object, arguments: tuple[TokenBatch, Any]) -> None:
            if arguments[0].num_tokens > self.tokens:
                of_the_cpu()
            self.computed += arguments[0].row_ids

        self.hook = self.scorer.register_forward_pre_hook(before)
        return self.computed

    def __exit__(self, *_: object) -> None:
        self.hook.remove()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="this C library keeps its heap")
def test_a_trimmed_heap_goes_back_to_the_system() -> None:
    """In a process that keeps what it frees, as stages do: 100 MiB below a block that stays."""
    program = """
from stages.training.out_of_memory import trim_heap
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
blocks = [bytearray(b"x" * 2**20) for _ in range(101)]
del blocks[:100]
before = resident()
trim_heap()
print(before - resident())
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | stage_variables(1),
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) > 90 * 2**20
