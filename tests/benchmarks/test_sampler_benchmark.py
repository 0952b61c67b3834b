"""What the sampler's benchmark asks of both contestants."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import fmean

from tests.benchmarks.cases import Architecture, case_of
from tests.benchmarks.folder import CaseFolder
from tests.benchmarks.models import save_models
from tests.benchmarks.sampler import SHAPES, Shape, asked
from tests.benchmarks.sampler_contestants import CONTESTANTS

TINY = Architecture(layers=2, hidden=32, intermediate=48, heads=4, kv_heads=2, head_dim=8)


def test_lengths_are_as_the_shape_says() -> None:
    """The first shape, which has a goal: mean 32, at most 96, and somebody reaches the end."""
    prompts, lengths = asked(SHAPES[0], vocabulary=100)
    every = [length for group in lengths for length in group]
    assert len(prompts) == 8 and {len(prompt) for prompt in prompts} == {256}
    assert len(every) == 64 and min(every) >= 1 and max(every) == 96 and abs(fmean(every) - 32) < 1
    assert len(set(every)) > 30


def test_both_contestants_make_completions_of_the_given_lengths(tmp_path: Path) -> None:
    """Each checks the lengths of what it made; both count the same tokens."""
    case = replace(case_of("grpo", "P12C6"), vocabulary=61, architecture=TINY)
    save_models(case, CaseFolder(tmp_path))
    for shape in (Shape("varied", 3, 2, (4, 20), 5, 12), Shape("even", 2, 1, (7, 7), 6, 6)):
        prompts, lengths = asked(shape, vocabulary=61)
        made = {name: CONTESTANTS[name](CaseFolder(tmp_path), prompts, lengths)() for name in ("ours", "generate")}
        assert set(made.values()) == {sum(map(sum, lengths))}
