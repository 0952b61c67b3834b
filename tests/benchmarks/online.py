"""Whole steps of on-line learning, sampling included: prompts, completions by the present weights, rewards, update.

Every step has the same prompts, and no two contestants draw the same completions: what is compared is the work, and a
run whose completions end early is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, pstdev
from tempfile import mkdtemp
from typing import Any
from unittest.mock import patch

import torch

from stages.context import local_context
from stages.data.dataset import write_dataset
from stages.data.ledger import RowLedger
from tests.benchmarks.cases import Case
from tests.benchmarks.folder import CaseFolder
from tests.benchmarks.models import EPSILON, SETTINGS, word_of
from tests.benchmarks.online_reward import even_share
from tests.benchmarks.plain import PlainLoop
from tests.benchmarks.recorder import Recorder
from tests.benchmarks.rows import PAD, Row

Steps = Sequence[Sequence[Row]]
LEAST_SHARE = 0.95
"""Of the completion tokens that a step is meant to have."""


def run_ours(case: Case, steps: Steps, folder: CaseFolder, recorder: Recorder) -> None:
    """Stage `rl` as it is, told of where its steps begin and end."""
    from stages.rl import run
    from stages.training.loop import Trainer
    from stages.training.rollout_windows import RolloutWindows

    settings = {
        **SETTINGS,
        "max_steps": case.steps,
        "train_batch_size": case.prompts * case.completions,
        "num_generations": case.completions,
        "max_completion_length": case.completion_tokens,
        "epsilon": EPSILON,
        # passes of one group: what a larger one gains in time is little beside what it takes
        "micro_batch_tokens": case.prompt_tokens + case.completions * case.completion_tokens,
        "rewards": [f"{Path(__file__).with_name('online_reward.py')}:even_share"],
    }
    inputs: dict[str, Path | list[Path]] = {"model": folder.model, "dataset": save_prompts(steps[0], folder)}
    # a run's own folder: another one would find its states and have nothing to do
    own = Path(mkdtemp(dir=folder.scratch))
    context = local_context("rl", settings, folder=own, inputs=inputs)
    window, step = RolloutWindows.window, Trainer.step

    def first(windows: RolloutWindows, number: int) -> Any:
        if number == 0:
            recorder.begin()
        return window(windows, number)

    def last(*arguments: Any) -> Any:
        row, ids = step(*arguments)
        require_length(case, row["completions/mean_length"])
        recorder.done({})
        return row, ids

    with patch.object(RolloutWindows, "window", first), patch.object(Trainer, "step", last):
        run(context)


def save_prompts(rows: Sequence[Row], folder: CaseFolder) -> Path:
    """The rows' prompts as a dataset artifact's folder."""
    path = folder.scratch / "prompts"
    path.mkdir(parents=True, exist_ok=True)
    prompts = [{"row_id": row.row_id, "prompt": text_of(row)} for row in rows]
    ledger = RowLedger()
    ledger.use(len(prompts))
    write_dataset(path, prompts, type="prompt", conversational=False, ledger=ledger, source={})
    return path


def text_of(row: Row) -> str:
    """The prompt in the words of the benchmark's tokenizer, one a token."""
    return " ".join(map(word_of, row.prompt))


def run_plain(case: Case, steps: Steps, folder: CaseFolder, recorder: Recorder) -> None:
    """`generate`, rewards, and the plain loop's update."""
    loop = PlainLoop(case, folder)
    recorder.begin()
    for rows in steps:
        loop.grpo([_rewarded(row, ids) for row, ids in zip(rows, _generated(loop, case, rows), strict=True)])
        recorder.done({})


@torch.no_grad()
def _generated(loop: PlainLoop, case: Case, rows: Sequence[Row]) -> list[tuple[list[int], ...]]:
    prompts_BP = torch.tensor([row.prompt for row in rows], device=loop.device)
    loop.model.eval()
    ids = loop.model.generate(
        prompts_BP,
        attention_mask=torch.ones_like(prompts_BP),
        do_sample=True,
        top_k=0,
        max_new_tokens=case.completion_tokens,
        num_return_sequences=case.completions,
        pad_token_id=PAD,
    )
    loop.model.train()
    completions = [[token for token in tail if token != PAD] for tail in ids[:, prompts_BP.shape[1] :].tolist()]
    require_length(case, fmean(map(len, completions)))
    size = case.completions
    return [tuple(completions[start : start + size]) for start in range(0, len(completions), size)]


def _rewarded(row: Row, completions: tuple[list[int], ...]) -> Row:
    rewards = even_share(completions)
    mean, deviation = fmean(rewards), pstdev(rewards)
    return replace(
        row, completions=completions, advantages=tuple((reward - mean) / (deviation + 1e-4) for reward in rewards)
    )


def require_length(case: Case, mean_tokens: float) -> None:
    """Raises RuntimeError where completions are shorter than the case says: then there is less work."""
    if mean_tokens < LEAST_SHARE * case.completion_tokens:
        raise RuntimeError(f"completions have {mean_tokens:.1f} tokens on average, not {case.completion_tokens}")
