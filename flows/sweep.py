"""`posttrain sweep`: a recipe with every combination of the values given. All is read and planned before any runs."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from artifacts import Store
from artifacts.errors import Problem, RequestError
from flows.many_runs import varied_in
from flows.plan import Plan, plan_reading
from flows.recipe import read_recipe
from flows.trial import Ranking, Trial
from flows.yaml_lines import parse_value, parse_values
from stages.names import nearest

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,60}")
"""The ids of the trials' runs have it in them."""
NOT_VARIED = ("name", "parallel")
"""Keys of a recipe that change nothing of what a trial gives."""


@dataclass(frozen=True)
class Request:
    """A sweep as it is asked for; the fields are the options of the command line."""

    recipe: str
    over: Sequence[str]
    set: Sequence[str] = ()
    only: Sequence[str] = ()
    start: Sequence[str] = ()
    until: Sequence[str] = ()
    name: str | None = None
    metric: str | None = None
    best: str | None = None
    parallel: int = 1
    store: str | None = None

    def arguments(self) -> list[str]:
        """What is the same of each trial, as arguments of `posttrain run`."""
        store = [] if self.store is None else [self.store]
        given = {
            "--set": self.set,
            "--only": self.only,
            "--from": self.start,
            "--until": self.until,
            "--store": store,
        }
        return [word for option, values in given.items() for value in values for word in (option, value)]


def request_of(options: Namespace) -> Request:
    """What the command line asks for."""
    names = ("recipe", "over", "set", "only", "until", "name", "metric", "best", "parallel", "store")
    return Request(start=getattr(options, "from"), **{name: getattr(options, name) for name in names})


@dataclass(frozen=True)
class Axis:
    """A setting and its values, each as written and as read."""

    name: str
    values: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Sweep:
    """Trials that are planned, in the order of their values, the last setting changing fastest."""

    name: str
    recipe: str
    axes: tuple[Axis, ...]
    trials: tuple[Trial, ...]
    parallel: int
    store: Store


def plan_sweep(request: Request, store: Store) -> Sweep:
    """Every trial with its plan. Raises RequestError with the mistakes of all of them."""
    axes = read_axes(request)
    points = list(itertools.product(*(axis.values for axis in axes)))
    chosen = [{axis.name: text for axis, (text, _) in zip(axes, point, strict=True)} for point in points]
    plans = _plans(request, store, chosen)
    name = request.name or _name(plans[0].recipe.name, request, axes)
    ranking = ranking_of(plans[0], request.metric, request.best)
    varied = varied_in([made.recipe.text for made in plans])
    trials = tuple(
        Trial(
            sweep=name,
            number=number,
            of=len(points),
            texts=texts,
            values={axis.name: value for axis, (_, value) in zip(axes, point, strict=True)},
            varied=varied,
            ranking=ranking,
            command=("posttrain", "run", request.recipe, *request.arguments(), *_as_options(texts)),
            plan=made,
            beside=min(request.parallel, len(points)),
        )
        for number, (point, texts, made) in enumerate(zip(points, chosen, plans, strict=True), start=1)
    )
    return Sweep(name, plans[0].recipe.name, axes, trials, request.parallel, store)


def read_axes(request: Request) -> tuple[Axis, ...]:
    """The settings that vary. Raises RequestError for what is no list of values, and for a setting given twice."""
    fixed = {text.partition("=")[0].strip() for text in request.set}
    axes: dict[str, Axis] = {}
    problems = []
    if request.name is not None and not NAME.fullmatch(request.name):
        what = "expected letters, digits, '.', '_' and '-', beginning with a letter or digit, at most 61"
        problems.append(Problem(f"--name {request.name}", what))
    for text in request.over:
        name, equals, values = (part.strip() for part in text.partition("="))
        origin = f"--over {text}"
        if not name or not equals:
            problems.append(Problem(origin, "expected NAME=VALUE,VALUE, for example dpo.beta=0.05,0.1"))
        elif name in axes or name in fixed:
            other = "--over" if name in axes else "--set"
            problems.append(Problem(origin, f"{name} is given by another {other} as well; leave one of them out"))
        elif name in NOT_VARIED:
            problems.append(Problem(origin, f"{name} changes nothing of what a trial gives; give it with --set"))
        else:
            try:
                axes[name] = _axis(name, values, origin)
            except RequestError as error:
                problems += error.problems
    if problems:
        raise RequestError(problems)
    return tuple(axes.values())


def _axis(name: str, text: str, origin: str) -> Axis:
    try:
        read = parse_values(text, origin)
    except RequestError as error:  # of a text that is in brackets by now, so its lines say nothing
        raise RequestError([Problem(origin, problem.what) for problem in error.problems]) from error
    if not read:
        raise RequestError([Problem(origin, "no value is given; expected NAME=VALUE,VALUE")])
    seen: dict[str, str] = {}
    for written, value in read:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        key = json.dumps(float(value) if is_number else value, sort_keys=True)  # 1 and 1.0 make one trial
        if key in seen:
            what = f"{written} is given twice" + ("" if seen[key] == written else f" (as {seen[key]})")
            raise RequestError([Problem(origin, f"{what}; each value makes one trial")])
        seen[key] = written
    return Axis(name, tuple((_written(written, value), value) for written, value in read))


def _written(text: str, value: Any) -> str:
    """As `--set` reads it: what stands between commas may mean something else alone."""
    try:
        same = json.dumps(parse_value(text, text)) == json.dumps(value)
    except RequestError:
        same = False
    return text if same else json.dumps(value, ensure_ascii=False)


def _as_options(texts: Mapping[str, str]) -> Iterator[str]:
    for name, text in texts.items():
        yield from ("--set", f"{name}={text}")


def _name(recipe: str, request: Request, axes: Sequence[Axis]) -> str:
    """Of what is asked for, so that the same command goes on with the same sweep."""
    values = {axis.name: [value for _, value in axis.values] for axis in axes}
    asked = json.dumps([request.set, request.only, request.start, request.until, values])
    return f"{recipe[:54]}-{hashlib.sha256(asked.encode()).hexdigest()[:6]}"


def _plans(request: Request, store: Store, chosen: Sequence[Mapping[str, str]]) -> list[Plan]:
    made: list[Plan] = []
    found: dict[Problem, list[Mapping[str, str]]] = {}
    for texts in chosen:
        settings = [f"{name}={text}" for name, text in texts.items()]
        try:
            read = read_recipe(request.recipe, [*request.set, *settings])
            made.append(plan_reading(read, store, only=request.only, start=request.start, until=request.until))
        except RequestError as error:
            for problem in dict.fromkeys(error.problems):
                found.setdefault(_of_sweep(problem, settings), []).append(texts)
    if found:
        raise RequestError([_named(problem, having, len(chosen)) for problem, having in found.items()])
    return made


def _of_sweep(problem: Problem, settings: Iterable[str]) -> Problem:
    """Settings of a trial were given with --over."""
    for setting in settings:
        if problem.where == f"--set {setting}" or problem.where.startswith(f"--set {setting}: "):
            return Problem(problem.where.replace("--set", "--over", 1), problem.what)
    return problem


def _named(problem: Problem, having: Sequence[Mapping[str, str]], trials: int) -> Problem:
    """With the values that the trials with this mistake have in common, where others do not have it."""
    if len(having) == trials or problem.where.startswith("--over "):
        return problem
    common = set(having[0].items()).intersection(*(texts.items() for texts in having)) or having[0].items()
    values = " ".join(f"{name}={text}" for name, text in having[0].items() if (name, text) in common)
    return Problem(problem.where, f"{problem.what} (with {values})")


def ranking_of(made: Plan, metric: str | None, best: str | None) -> Ranking:
    """What a sweep is judged by: STAGE or STAGE.METRIC, or else the last evaluation, or else the last stage."""
    selected = [name for name in made.recipe.stages if name in made.selection.selected]
    if metric is None:
        judged = [name for name in selected if "evaluation" in made.recipe.stages[name].uses.outputs.values()]
        return Ranking((judged or selected)[-1], None, best)
    stage, _, name = metric.partition(".")
    if stage not in selected:
        there = f"expected STAGE.METRIC or STAGE, of the stages that run: {', '.join(selected)}"
        raise RequestError([Problem(f"--metric {metric}", f"no stage {stage!r}{nearest(stage, selected)}; {there}")])
    return Ranking(stage, name or None, best)
