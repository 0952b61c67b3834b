"""Real vLLM gets other weights amid completions: each token's log-probability is that of transformers with the weights
that made it, over keys and values that the weights before left."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stages.context import Context
from stages.rollouts.requests import Completion, SampleRequest, SamplingConfig
from stages.rollouts.vllm_client import ServerEngine
from stages.rollouts.vllm_in_flight import Amid
from stages.training.model import Scorer
from stages.training.whole_weights import whole_weights
from tests.data.characters import IDS
from tests.stages.small_models import output, read_lines, rows_of
from tests.stages.test_overlap import done
from tests.vllm.given import asked
from tests.vllm.models import over_kept_cache, served, teacher_forced, worst
from tests.vllm.test_engine import PROMPTS, load
from tests.vllm.test_given_servers import proof
from tests.vllm.test_overlap import context_of
from tests.vllm.test_stage import saved

IN_FLIGHT = {"max_staleness": 1, "in_flight_updates": True}
LONG = SamplingConfig(max_completion_length=32)
REQUESTS = [SampleRequest(prompt, tuple(range(16)), f"r{number}") for number, prompt in enumerate(PROMPTS)]
"""Their prompts are shorter than a page of the prefix cache, so that every completion reads its own."""
MOST = 12
"""Completions to be computed again, token by token."""


def opened(url: str, folder: Path, place: Path) -> ServerEngine:
    """Of completions without end."""
    return asked(url, replace(served(folder / "1"), end_token_ids=()), place, **IN_FLIGHT)


Found = list[tuple[list[int], Completion]]
"""Completions with their prompts."""


def amid(engine: ServerEngine, models: dict[int, Any]) -> tuple[Found, Found]:
    """Completions that more than one of the models made, and others. The engine gets models 1 and 2 in turn until they
    are made; under the numbers of the turns these are added to the models."""
    for _ in range(50):
        with ThreadPoolExecutor(1) as pool:
            sampling = pool.submit(engine.sample, REQUESTS, LONG)
            while not sampling.done():
                models[len(models) + 1] = model = models[len(models) - 1]
                engine.load(whole_weights(model))
        pairs = [(prompt, one) for prompt, group in zip(PROMPTS, sampling.result(), strict=True) for one in group]
        if mixed := [pair for pair in pairs if len(set(pair[1].weight_versions)) > 1]:
            return mixed, [pair for pair in pairs if pair not in mixed]
    raise AssertionError("completions were always faster than weights")


def test_every_token_is_of_the_weights_that_it_names_over_what_others_left(
    server: tuple[str, Path], tmp_path: Path
) -> None:
    url, folder = server
    engine = opened(url, folder, tmp_path)
    models = {number: load(folder, str(number)) for number in (1, 2)}
    for number in (1, 2):
        engine.load(whole_weights(models[number]))
    mixed, others = amid(engine, models)
    pairs = [*mixed[:MOST], *others[:4]]
    kept = [over_kept_cache(models, prompt, one.token_ids, one.weight_versions) for prompt, one in pairs]
    assert worst([one.logprobs for _, one in pairs], kept) < 1e-3
    # the last weights over keys and values of their own would find their tokens otherwise likely
    anew = [teacher_forced(models[one.weight_versions[-1]], prompt, one.token_ids) for prompt, one in mixed]
    tails = [one.weight_versions.index(one.weight_versions[-1]) for _, one in mixed]
    found = [one.logprobs[start:] for (_, one), start in zip(mixed, tails, strict=True)]
    assert worst(found, [values[start:] for values, start in zip(anew, tails, strict=True)]) > 1e-2
    requests, groups = zip(*((SampleRequest(prompt, (), "r"), [one]) for prompt, one in pairs), strict=True)
    proof(engine, tmp_path)(Scorer(models[len(models)]), requests, groups, LONG, fresh=False)


def test_who_is_asked_later_reads_nothing_of_old_weights(server: tuple[str, Path], tmp_path: Path) -> None:
    """Prompts longer than a page of the prefix cache, which nothing made forget them: under one salt for both weights
    they are read as the old ones left them."""
    url, folder = server
    engine, models = opened(url, folder, tmp_path), [load(folder, name) for name in ("1", "2")]
    draws = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, len(IDS), (4, 40), generator=draws).tolist()
    requests = [SampleRequest(prompt, tuple(range(4)), f"r{number}") for number, prompt in enumerate(prompts)]
    settings = SamplingConfig(max_completion_length=8)

    def difference(model: Any) -> float:
        found = engine.sample(requests, settings)
        pairs = [(prompt, one) for prompt, group in zip(prompts, found, strict=True) for one in group]
        return worst(
            [one.logprobs for _, one in pairs], [teacher_forced(model, prompt, one.token_ids) for prompt, one in pairs]
        )

    for model in models:
        engine.load(whole_weights(model))
        assert difference(model) < 1e-4
    engine._ask = Amid(SimpleNamespace(run=engine._servers.run, weights_name="the same")).ask
    for model, (least, most) in zip(models[::-1], [(0, 1e-4), (1e-2, 99)], strict=True):
        engine.load(whole_weights(model))
        assert least <= difference(model) < most


def test_a_stage_trains(server: tuple[str, Path], tmp_path: Path) -> None:
    """Every sync proved, by completions of one version or by what is made of others'."""
    url, folder = server
    inputs = saved(tmp_path / "inputs", tied=folder.name == "tied")
    engine = {**IN_FLIGHT, "urls": [url], "weights_folder": str(tmp_path)}
    compare_ages(done(context_of(tmp_path / "run", inputs, **engine)))


@pytest.mark.nightly
def test_a_stage_trains_with_a_server_of_its_own(tmp_path: Path) -> None:
    inputs = saved(tmp_path / "inputs", tied=True)
    compare_ages(done(context_of(tmp_path / "run", inputs, **IN_FLIGHT)))


def compare_ages(context: Context) -> None:
    metrics, made = read_lines(output(context, "model") / "metrics.jsonl"), rows_of(output(context, "rollouts"))
    assert len({row["row_id"] for row in made}) == len(made) == 64
    for row in made:
        ages = {row["step"] - 1 - version for version in row["weight_versions"]}
        assert ages <= ({0} if row["step"] == 1 else {0, 1})
        assert row["weight_versions"] == sorted(row["weight_versions"])
    assert metrics[0]["sampling/sampling_logp_difference/max"] < 1e-3
    for step, row in enumerate(metrics, start=1):
        versions = [one["weight_versions"] for one in made if one["step"] == step]
        tokens = [version for one in versions for version in one]
        assert row["sample/stale_tokens"] == pytest.approx(sum(one < step - 1 for one in tokens) / len(tokens))
