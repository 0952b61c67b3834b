"""The decision of `gate`: each metric of the candidate against the baseline's, row by row, and against its limit."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from artifacts.errors import StageError
from stages.context import Context
from stages.evaluation.paired import Pairs
from stages.evaluation.scores import LARGE_IS_BAD, SHARES, Part, recomputed, row_parts
from stages.gate import Config

Samples = list[dict[str, Any]]


@dataclass(frozen=True)
class Verdict:
    """What was found of one metric. `difference` is candidate less baseline, with its interval; `p` is of the test that
    decides, and counts as shown from `level` downwards."""

    metric: str
    passed: bool
    candidate: float
    rows: int
    baseline: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    tolerated: float | None = None
    p: float | None = None
    level: float | None = None
    limit: float | None = None

    def words(self) -> str:
        """For the log, and for the error."""
        if self.limit is not None:
            bound = "at most" if _less(self.metric) else "at least"
            return f"{self.metric} {self.candidate:.4g}, {bound} {self.limit:.4g} asked for"
        return (
            f"{self.metric} {self.candidate:.4g} after {self.baseline:.4g}: {self.difference:+.4g} "
            f"[{self.low:+.4g}, {self.high:+.4g}], tolerated {self.tolerated:.4g}, p {self.p:.2g} of {self.level:.2g}"
        )


def decide(context: Context) -> None:
    """Raises StageError where a metric does not pass, or where the evaluations cannot be compared."""
    config: Config = context.config
    _require_kind(context)
    _require_comparable(context)
    candidate = _samples(context, "candidate", [*config.limits, *config.metrics])
    verdicts = [*_against_limits(config, candidate)]
    if context.has("baseline"):
        verdicts += _against_baseline(context, candidate, _samples(context, "baseline", config.metrics))
    _report(context, verdicts)
    if failed := [verdict.words() for verdict in verdicts if not verdict.passed]:
        raise StageError(f"the gate ({config.passes}) stays shut: {'; '.join(failed)}")
    context.hand_on(config.kind, "model")
    context.hand_on("evaluation", "candidate")
    said = {"passes": config.passes, "level": config.level, "metrics": [asdict(verdict) for verdict in verdicts]}
    (context.output("verdict") / "verdict.json").write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")


def _require_kind(context: Context) -> None:
    kind = context.spec.inputs["model"]["kind"]
    if kind != context.config.kind:
        raise StageError(f"input model is of kind {kind}; set kind: {kind}, as which it is handed on")


def _samples(context: Context, name: str, metrics: Iterable[str]) -> Samples:
    """Of an evaluation. Raises StageError for a metric that it did not measure, or that does not follow from them."""
    folder = context.input(name)
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    with open(folder / "samples.jsonl", encoding="utf-8") as file:
        samples = [json.loads(line) for line in file]
    for metric in metrics:
        # a column of the dataset may be called like what was not measured
        if metric not in results:
            raise StageError(
                f"input {name} did not measure {metric}; have it measured there, or leave it out here (it has: "
                f"{', '.join(results)})"
            )
        value, said = recomputed(metric, samples), float(results[metric]["value"])
        if value is None or not math.isclose(value, said, rel_tol=1e-9, abs_tol=1e-12):
            raise StageError(f"{metric} of input {name} is {said!r}, but its samples give {value!r}; evaluate it again")
    return samples


def _require_comparable(context: Context) -> None:
    """The candidate is an evaluation of the model, and the baseline one of the same rows under the same settings."""
    candidate = context.producer_of("candidate")
    of, wanted = candidate["inputs"].get("model"), context.input_digest("model")
    if of != wanted:
        raise StageError(f"input candidate is an evaluation of {of}, but input model is {wanted}; evaluate that one")
    if not context.has("baseline"):
        return
    ours, theirs = (dict(_flat(_settings(producer))) for producer in (candidate, context.producer_of("baseline")))
    different = [name for name in {**theirs, **ours} if ours.get(name) != theirs.get(name)]
    if different:
        told = "; ".join(f"{name}: {theirs.get(name)} -> {ours.get(name)}" for name in different[:5])
        raise StageError(f"the evaluations differ in more than the model ({told}); evaluate both in the same way")


def _settings(producer: Mapping[str, Any]) -> dict[str, Any]:
    inputs = {name: digest for name, digest in producer["inputs"].items() if name != "model"}
    return {"stage": producer["stage"], "version": producer["version"], "with": producer["config"], "inputs": inputs}


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, one in value.items():
            yield from _flat(one, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _less(metric: str) -> bool:
    return metric in LARGE_IS_BAD


def _against_limits(config: Config, candidate: Samples) -> Iterator[Verdict]:
    for metric, limit in config.limits.items():
        value = recomputed(metric, candidate)
        assert value is not None
        passed = value <= limit if _less(metric) else value >= limit
        yield Verdict(metric, passed, value, len(row_parts(metric, candidate)), limit=limit)


def _against_baseline(context: Context, candidate: Samples, baseline: Samples) -> Iterator[Verdict]:
    config: Config = context.config
    for metric, tolerated in config.metrics.items():
        ours, theirs = row_parts(metric, candidate), row_parts(metric, baseline)
        pairs = Pairs.of(ours, theirs)
        _require_pairs(context, metric, pairs)
        found = pairs.difference(config.seed)
        p, level, passed = _test(config, metric, _better_is_more(metric, ours, theirs), tolerated)
        yield Verdict(
            metric,
            passed,
            candidate=float(pairs.candidate_sums_R.sum() / pairs.candidate_counts_R.sum()),
            rows=found.n,
            baseline=float(pairs.baseline_sums_R.sum() / pairs.baseline_counts_R.sum()),
            difference=found.value,
            low=found.low,
            high=found.high,
            tolerated=tolerated,
            p=p,
            level=level,
        )


def _better_is_more(metric: str, *sides: Mapping[str, Part]) -> Pairs:
    sign = -1.0 if _less(metric) else 1.0
    return Pairs.of(*({row: (sign * total, count) for row, (total, count) in side.items()} for side in sides))


def _test(config: Config, metric: str, pairs: Pairs, tolerated: float) -> tuple[float, float, bool]:
    """(p, the level it is held to, whether the candidate passes)."""
    if config.passes == "unless_worse":
        # any of the tests may stop the candidate: together they err no more often than one would (Bonferroni)
        level = config.level / len(config.metrics)
        p = pairs.chance_of_less(-tolerated, config.draws, config.seed)
        return p, level, p > level
    # all of them must agree, so each may be held to the whole level (Berger 1982)
    least = -tolerated if config.passes == "if_not_worse" else tolerated
    p = pairs.chance_of_more(least, config.draws, config.seed, spread=1.0 if metric in SHARES else None)
    return p, config.level, p <= config.level


def _require_pairs(context: Context, metric: str, pairs: Pairs) -> None:
    share = len(pairs.alone) / (len(pairs.alone) + len(pairs))
    if share > context.config.max_unpaired or not len(pairs):
        raise StageError(
            f"{metric}: {len(pairs.alone)} rows were measured in one evaluation only, {len(pairs)} in both (first: "
            f"{pairs.alone[0]}); max_unpaired permits a share of {context.config.max_unpaired:g}, this is {share:.3g}"
        )
    if pairs.alone:
        context.log(f"{metric}: {len(pairs.alone)} rows were measured in one evaluation only and do not count")


def _report(context: Context, verdicts: list[Verdict]) -> None:
    rows = [asdict(verdict) for verdict in verdicts]
    text = "\n".join(f"{'passed' if verdict.passed else 'FAILED'}: {verdict.words()}" for verdict in verdicts)
    context.table("verdict", "verdict of the gate", rows, text)
    context.counts["rows"] = max(verdict.rows for verdict in verdicts)
    compared = [verdict for verdict in verdicts if verdict.difference is not None]
    for prefix, verdict in [("", one) for one in compared[:1]] + [(f"{one.metric}/", one) for one in compared]:
        found = {"difference": verdict.difference, "difference/low": verdict.low, "difference/high": verdict.high}
        context.metrics |= {f"{prefix}{name}": value for name, value in found.items()} | {f"{prefix}p": verdict.p}
