"""Changes to a recipe from outside: `--set` and `${parameter}`."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from artifacts.errors import Problem, RequestError
from flows.document import Document, Place
from flows.fields import found
from flows.yaml_lines import parse_value
from stages import stage as registry
from stages.foreign import FOREIGN
from stages.names import nearest

SECTIONS = ("with", "inputs", "launch")
"""What a stage of a recipe holds beside `uses`."""

_MOST_NAMED = 4
"""Fields in a message."""

_PARAMETER = re.compile(r"(\$?)\$\{([^}]*)\}")
_MISSING = object()
_SET = "--set "
"""How the origin of what was set begins."""


def apply_overrides(document: Document, overrides: Iterable[str]) -> tuple[Document, list[Problem]]:
    """The document with each `a.b=c` set, and the ones that name nothing."""
    data, origins = copy.deepcopy(document.data), dict(document.origins)
    changed = Document(data, document.origin, origins)
    problems = []
    for text in overrides:
        origin = f"{_SET}{text}"
        target, equals, value_text = text.partition("=")
        if not equals or not target.strip():
            problems.append(Problem(origin, "expected NAME=VALUE, for example dpo.beta=0.2"))
            continue
        try:
            place = _place(data, target.strip())
            value = parse_value(value_text, origin)
            _set(data, place, value)
        except _NoSuchTarget as error:
            problems.append(Problem(origin, str(error)))
        except RequestError as error:
            problems += [Problem(origin, problem.what) for problem in error.problems]
        else:
            for below in [known for known in origins if known[: len(place)] == place]:
                del origins[below]
            origins[place] = origin
    return changed, problems


def set_by(document: Document) -> tuple[str, ...]:
    """The overrides that hold, in the order they were given; one that a later one replaced is none."""
    return tuple(text.removeprefix(_SET) for text in document.origins.values() if text.startswith(_SET))


class _NoSuchTarget(Exception):
    """An override names nothing that can be set."""


def _place(data: Mapping[str, Any], target: str) -> Place:
    """Where in the recipe `dpo.beta`, `dpo.launch.processes`, `launch.threads` or a parameter stands."""
    head, *rest = target.split(".")
    parameters, stages = _names(data, "parameters"), _names(data, "stages")
    if head in parameters:
        return ("parameters", head, *rest)
    if head in ("name", "parallel") and not rest:
        return (head,)
    if head == "launch" and rest:
        return ("launch", *rest)
    if head in stages and rest:
        section = rest[0] if rest[0] in SECTIONS and len(rest) > 1 else None
        return ("stages", head, *rest) if section else ("stages", head, "with", *rest)
    if head in stages:
        raise _NoSuchTarget(f"{head!r} is a stage; say which of its fields: {head}.FIELD=VALUE")
    known = [*parameters, *stages, "name", "parallel", "launch"]
    fields = [] if rest else [f"{stage}.{field}" for stage, field in _fields_meant(data, head)]
    some = f"{', '.join(fields[:_MOST_NAMED])}{' and others' if len(fields) > _MOST_NAMED else ''}"
    hint = f"; a field is set with its stage: {some}" if fields else nearest(head, known)
    raise _NoSuchTarget(
        f"nothing named {head!r} can be set{hint}; there are "
        f"the parameters {', '.join(parameters) or '(none)'} and the stages {', '.join(stages) or '(none)'}"
    )


def _fields_meant(data: Mapping[str, Any], name: str) -> Iterator[tuple[str, str]]:
    """Stages of the recipe with a field of that name, or of the name that another tool's has here."""
    concept = FOREIGN.get(name)
    for stage, body in data["stages"].items() if isinstance(data.get("stages"), Mapping) else ():
        uses = body.get("uses") if isinstance(body, Mapping) else None
        fields = registry.load_stage(uses).config.model_fields if uses in registry.STAGES else {}
        yield from ((stage, field) for field in fields if field == name or (concept and field in concept.fields))


def _names(data: Mapping[str, Any], section: str) -> list[str]:
    values = data.get(section) if isinstance(data, Mapping) else None
    return list(values) if isinstance(values, Mapping) else []


def _set(data: Any, place: Place, value: Any) -> None:
    """Set the value at a place, making the mappings on the way that were not written."""
    for index, part in enumerate(place[:-1]):
        below = _step(data, part)
        if below is _MISSING or below is None:
            below = data[part] = {}
        if not isinstance(below, dict | list):
            name = ".".join(map(str, place[: index + 1]))
            raise _NoSuchTarget(f"{name} is {found(below)}, so nothing below it can be set")
        data = below
    last = place[-1]
    if isinstance(data, list):
        if _step(data, last) is _MISSING:
            raise _NoSuchTarget(f"{last!r} is no index of a list of {len(data)}; they start at 0")
        data[int(last)] = value
    else:
        data[last] = value


def _step(data: Any, part: str | int) -> Any:
    if isinstance(data, dict):
        return data.get(part, _MISSING)
    if isinstance(data, list) and str(part).isdigit() and int(part) < len(data):
        return data[int(part)]
    if isinstance(data, list):
        raise _NoSuchTarget(f"{part!r} is no index of a list of {len(data)}; they start at 0")
    return _MISSING


def fill_parameters(document: Document) -> tuple[Document, list[Problem], set[str]]:
    """The document with every `${name}` replaced; `$${` stays as `${`. Parameters themselves are left out.

    Also what is wrong with parameters, and where their values were needed (what else is wrong there follows).
    """
    parameters = document.data.get("parameters")
    if parameters is not None and not isinstance(parameters, Mapping):
        what = f"expected a mapping of parameter names to defaults, found {found(parameters)}"
        return document, [document.problem(("parameters",), what)], set()
    filler = _Filler(document, parameters or {})
    data = {key: filler.fill(value, (key,)) for key, value in document.data.items() if key != "parameters"}
    return Document(data, document.origin, document.origins), filler.problems, filler.unfilled


def hiding_parameters(document: Document) -> list[Problem]:
    """Parameters that hide a stage or a key of the recipe from `--set`: a mistake of the recipe as it is written."""
    stages = _names(document.data, "stages")
    what = "the name is taken by a stage or a key of the recipe; choose another"
    return [
        document.problem(("parameters", name), what)
        for name in _names(document.data, "parameters")
        if name in stages or name in ("name", "parallel", "launch")
    ]


def unused_parameters(document: Document) -> list[Problem]:
    """Parameters whose value goes nowhere in the recipe as it is written; setting one would change nothing."""
    parameters = _names(document.data, "parameters")
    written = {key: value for key, value in document.data.items() if key != "parameters"}
    used = {match[2].strip() for text in _texts(written) for match in _PARAMETER.finditer(text) if not match[1]}
    what = "nothing in the recipe uses it; write ${%s} where it belongs, or take it out"
    return [document.problem(("parameters", name), what % name) for name in parameters if name not in used]


def places_of_parameters(document: Document) -> Iterator[tuple[str, Place, bool]]:
    """Each use of a parameter: its name, where, and whether the value there is the parameter and nothing else."""
    written = {key: value for key, value in document.data.items() if key != "parameters"}
    for place, text in _placed_texts(written, ()):
        whole = _PARAMETER.fullmatch(text)
        for match in _PARAMETER.finditer(text):
            if not match[1]:
                yield match[2].strip(), place, whole is not None


def _placed_texts(value: Any, place: Place) -> Iterator[tuple[Place, str]]:
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, Mapping | list):
        for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _placed_texts(inner, (*place, key))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(inner)


class _Filler:
    def __init__(self, document: Document, parameters: Mapping[str, Any]) -> None:
        self.document = document
        self.parameters = parameters
        self.problems: list[Problem] = []
        self.unfilled: set[str] = set()
        self._not_given: set[str] = set()

    def fill(self, value: Any, place: Place) -> Any:
        if isinstance(value, Mapping):
            return {key: self.fill(inner, (*place, key)) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.fill(inner, (*place, index)) for index, inner in enumerate(value)]
        if not isinstance(value, str) or "${" not in value:
            return value
        whole = _PARAMETER.fullmatch(value)
        if whole and not whole[1]:
            return copy.deepcopy(self._parameter(whole[2].strip(), place))
        return _PARAMETER.sub(lambda match: self._inside(match, place), value)

    def _inside(self, match: re.Match[str], place: Place) -> str:
        if match[1]:
            return match[0][1:]
        value = self._parameter(match[2].strip(), place)
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, Mapping | list):
            what = f"${{{match[2]}}} is {found(value)} and cannot stand inside a text"
            self.problems.append(self.document.problem(place, what))
            self.unfilled.add(self.document.where(place))
        return str(value)

    def _parameter(self, name: str, place: Place) -> Any:
        if name not in self.parameters:
            names = ", ".join(self.parameters) or "none"
            what = f"unknown parameter {name!r}{nearest(name, self.parameters)}; the recipe has: {names}"
            self.problems.append(self.document.problem(place, what))
            self.unfilled.add(self.document.where(place))
            return None
        value = self.parameters[name]
        if value is None:
            self.unfilled.add(self.document.where(place))
        if value is None and name not in self._not_given:
            self._not_given.add(name)
            what = f"the parameter has no default and must be given: --set {name}=..."
            self.problems.append(self.document.problem(("parameters", name), what))
        return value
