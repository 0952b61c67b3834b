"""One stage of a recipe as written: `uses`, `with` and `launch` checked; `inputs` are left to the wiring."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from artifacts.errors import Problem, RequestError
from flows.document import Document, Place
from flows.fields import found
from flows.known_part import known_part, wrong_together
from flows.launch_settings import Launch, read_launch
from flows.named_outside import refused_outside
from flows.validate import meant, unknown_key, validate
from flows.wiring import Declared
from stages import stage as registry
from stages.external import resolve_reference
from stages.identity import resolve_externals
from stages.names import meant_stage, stage_hint
from stages.stage import Config, Stage

TOP_KEYS = ("name", "parameters", "parallel", "launch", "stages")
"""The recipe's own; a stage of such a name could not be told from them by `--set`."""
KEYS = ("uses", "inputs", "with", "launch")

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,60}")


def declare_stages(document: Document, base: Path) -> tuple[list[tuple[Declared, dict[str, Any]]], list[Problem]]:
    """Every stage with its own launch settings, and what is wrong with them."""
    stages = document.data.get("stages")
    if not isinstance(stages, Mapping) or not stages:
        if stages is None and "stages" in meant(document.data, TOP_KEYS):
            return [], []
        what = "missing" if stages is None else f"found {found(stages)}"
        return [], [document.problem(("stages",), f"{what}; expected a mapping of stage names to stages")]
    declared, problems = [], []
    known = _Known()
    for name, body in stages.items():
        reader = _StageReader(document, name, base, known)
        declared.append(reader.read(body))
        problems += reader.problems
    return declared, problems


class _Known:
    """The stages there are, in full where the first message lists them."""

    def __init__(self) -> None:
        self._listed = False

    def listed(self) -> str:
        if self._listed:
            return "there are those listed above"
        self._listed = True
        return f"there are: {', '.join(registry.STAGES)}"


class _StageReader:
    def __init__(self, document: Document, name: str, base: Path, known: _Known) -> None:
        self.document = document
        self.name = name
        self.base = base
        self.known = known
        self.problems: list[Problem] = []

    def read(self, body: Any) -> tuple[Declared, dict[str, Any]]:
        if not _NAME.fullmatch(self.name) or self.name in TOP_KEYS:
            self._fail(
                (),
                "cannot be the name of a stage: letters, digits, - and _, beginning with a letter, "
                f"and none of {', '.join(TOP_KEYS)}",
            )
        if not isinstance(body, Mapping):
            self._fail((), f"expected a mapping with the keys {', '.join(KEYS)}, found {found(body)}")
            return Declared(self.name, None, None, {}), {}
        uses = self._uses(body)
        values = self._section(body, "with")
        judged = uses or self._meant(body)  # a misspelt name does not hide what is wrong below it
        self._check_keys(body, judged)
        lost = meant(body, KEYS)  # sections under misspelt keys, of which no more is said
        config = None if judged is None or "with" in lost else self._config(judged, values)
        launch, problems = read_launch(
            self._section(body, "launch"), self.document, ("stages", self.name, "launch"), self.base
        )
        self.problems += problems
        if uses is not None and uses.single and launch.get("processes", 1) > 1:
            self._fail(("launch", "processes"), f"{uses.name} runs in one process; leave processes out")
        if uses is None:
            return Declared(self.name, None, None, body.get("inputs")), launch
        known = known_part(uses.config, values) if config is None else config
        return Declared(self.name, uses, config, body.get("inputs"), known, "inputs" in lost), launch

    def _fail(self, place: Place, what: str) -> None:
        self.problems.append(self.document.problem(("stages", self.name, *place), what))

    def _uses(self, body: Mapping[str, Any]) -> Stage | None:
        name = body.get("uses")
        if name is None and "uses" in meant(body, KEYS):
            pass  # the key that is misspelt is named
        elif name is None:
            self._fail(("uses",), f"missing; expected the name of a stage; {self.known.listed()}")
        elif not isinstance(name, str):
            self._fail(("uses",), f"expected the name of a stage, found {found(name)}; {self.known.listed()}")
        elif name not in registry.STAGES:
            hint = stage_hint(name, registry.STAGES)
            self._fail(("uses",), f"unknown stage {name!r}{hint}; {self.known.listed()}")
        else:
            return registry.load_stage(name)
        return None

    def _meant(self, body: Mapping[str, Any]) -> Stage | None:
        """The stage that is suggested for a name that is none."""
        name = body.get("uses")
        meant = meant_stage(name, registry.STAGES) if isinstance(name, str) else None
        return None if meant is None else registry.load_stage(meant)

    def _check_keys(self, body: Mapping[str, Any], uses: Stage | None) -> None:
        sections = {"launch": list(Launch.model_fields)}
        if uses is not None:
            sections = {"with": list(uses.config.model_fields), "inputs": list(uses.inputs), **sections}
        listed: set[tuple[str, ...]] = set()
        for key in body:
            if key not in KEYS:
                self._fail((key,), unknown_key(key, KEYS, sections, listed))

    def _section(self, body: Mapping[str, Any], key: str) -> Mapping[str, Any]:
        value = body.get(key)
        if value is None:
            return {}
        if isinstance(value, Mapping):
            return value
        self._fail((key,), f"expected a mapping, found {found(value)}")
        return {}

    def _config(self, uses: Stage, values: Mapping[str, Any]) -> Config | None:
        elsewhere = {"inputs": list(uses.inputs), "launch": list(Launch.model_fields)}
        place = ("stages", self.name, "with")
        config, problems = validate(uses.config, values, self.document, place, elsewhere)
        told = {problem.where for problem in problems}
        missing = [problem for problem in self._missing_externals(uses.config, values) if problem.where not in told]
        self.problems += [*problems, *missing]
        if config is None:
            for what in wrong_together(known_part(uses.config, values)):
                self._fail(("with",), what)
        if config is None or missing:
            return None
        try:
            return resolve_externals(config, self.base)
        except RequestError as error:  # a default that names a file
            self._fail(("with",), str(error))
            return None

    def _missing_externals(self, model: type[Config], values: Mapping[str, Any]) -> Iterator[Problem]:
        """Data files, code files and functions that the configuration names and that are not there."""
        for place, what in refused_outside(
            model, values, lambda mark, text: resolve_reference(mark.kind, text, self.base)
        ):
            yield self.document.problem(("stages", self.name, "with", *place), what)
