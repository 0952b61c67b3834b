"""The graph of a recipe: references parsed, kinds checked, cycles found, stages put in order."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from artifacts.errors import Problem, RequestError
from flows.document import Document, Place
from flows.fields import found
from flows.inputs import (
    HUB_KINDS,
    Folder,
    HubModel,
    Reference,
    StageOutput,
    Wanted,
    folder_kinds,
    kinds_in_words,
    parse_external,
)
from flows.known_part import as_far_as_known
from flows.order import ordered
from flows.validate import meant
from stages.foreign import foreign
from stages.names import nearest
from stages.stage import Config, Input, Stage

_FIRST_PART = re.compile(r"[^.\s]+")
_ASKED_BY = {"test": "test_size", "adapter": "merge_adapters: false", "train": "remove: true"}
"""Output -> the setting without which stages that have both write none."""
_ANYTHING = Input((), required=False, many=True)
"""What an input of a stage takes that is of no known kind: whether what is named exists can be said all the same."""


@dataclass(frozen=True)
class Declared:
    """A stage of the recipe as far as it could be understood; None: that part is wrong and was reported."""

    name: str
    uses: Stage | None
    config: Config | None
    inputs: Any
    """As written."""
    known: Config | None = None
    """Of a configuration that is wrong the part that is not (`known_part`)."""
    unwired: bool = False
    """Whether its inputs stand under a misspelt key, which is reported."""

    @property
    def place(self) -> Place:
        return ("stages", self.name)

    def outputs(self) -> dict[str, str] | None:
        """Name -> kind of what it writes; None: not known because the stage is wrong."""
        if self.uses is None:
            return None
        return dict(self.uses.outputs) if self.config is None else self.uses.outputs_of(self.config)

    def with_also(self, output: str, what: str) -> str:
        """Which setting would make it write an output that it does not; empty: no such setting is known."""
        fields = self.uses.config.model_fields if self.uses and output in self.uses.outputs else {}
        setting = _ASKED_BY.get(output, "")
        return f"; with {setting} also {what}" if setting.partition(":")[0] in fields else ""


class Wiring:
    """Reads the inputs of all stages. `inputs` holds what could be read, `problems` what could not."""

    def __init__(self, document: Document, stages: Mapping[str, Declared], base: Path) -> None:
        self.document = document
        self.stages = stages
        self.base = base
        self.problems: list[Problem] = []
        self.wanted: list[Wanted] = []
        """Of the store, of folders and of the Hub, whatever else is wrong with the stage that wants it."""
        self.inputs: dict[str, dict[str, tuple[Reference, ...]]] = {}
        for stage in stages.values():
            self.inputs[stage.name] = dict(self._inputs_of(stage))
        self.order = self._order()

    def _fail(self, place: Place, what: str) -> None:
        self.problems.append(self.document.problem(place, what))

    def _inputs_of(self, stage: Declared) -> Iterator[tuple[str, tuple[Reference, ...]]]:
        if stage.unwired:
            return
        place = (*stage.place, "inputs")
        written = {} if stage.inputs is None else stage.inputs
        if not isinstance(written, Mapping):
            self._fail(place, f"expected a mapping of input names to references, found {found(written)}")
            return
        accepted = dict.fromkeys(written, _ANYTHING) if stage.uses is None else stage.uses.inputs
        for name, value in written.items():
            if name not in accepted:
                assert stage.uses is not None
                takes = f"{stage.uses.name} takes: {', '.join(accepted)}" if accepted else "this stage takes none"
                hint = foreign(name, list(accepted)) or nearest(name, accepted)
                self._fail((*place, name), f"unknown input{hint}; {takes}")
                continue
            entries = self._entries((*place, name), value, accepted[name])
            references = [self._reference(at, text, accepted[name], stage.name) for at, text in entries]
            if references and all(reference is not None for reference in references):
                yield name, tuple(reference for reference in references if reference is not None)
        for name, declared in accepted.items():
            if declared.required and name not in written and name not in meant(written, accepted):
                self._fail(place, f"input {name!r} is missing; it takes {_what_fits(declared)}")
        if stage.uses is not None:
            self._check_together(stage, stage.uses.check, frozenset(written) & frozenset(accepted))
            lists = {name: written[name] for name, declared in accepted.items() if declared.many and name in written}
            counts = {name: len(value) if isinstance(value, list) else 1 for name, value in lists.items()}
            self._check_together(stage, stage.uses.check_lists, counts)

    def _check_together(self, stage: Declared, check: Callable[[Any, Any], list[str]] | None, wired: Any) -> None:
        if check is None:
            return
        if stage.config is not None:
            messages = check(stage.config, wired)
        else:
            messages = as_far_as_known(check, stage.known, wired)
        for message in messages:
            self._fail(stage.place, message)

    def _entries(self, place: Place, value: Any, declared: Input) -> list[tuple[Place, str]]:
        """The references written for one input, each with its place."""
        values = value if isinstance(value, list) else [value]
        if isinstance(value, list) and not declared.many:
            self._fail(place, f"takes one artifact, found {found(value)}")
            return []
        if not values:
            self._fail(place, f"an empty list; give at least one: {_what_fits(declared)}")
        entries: list[tuple[Place, str]] = []
        for index, entry in enumerate(values):
            at = (*place, index) if isinstance(value, list) else place
            if isinstance(entry, str) and entry.strip():
                entries.append((at, entry.strip()))
            else:
                self._fail(at, f"expected {_what_fits(declared)}, found {found(entry)}")
        return entries

    def _reference(self, place: Place, text: str, declared: Input, reader: str) -> Reference | None:
        first = _FIRST_PART.match(text)
        if first and first[0] in self.stages:
            return self._stage_output(place, text, declared)
        reference = parse_external(text, self.base)
        if reference is None:
            others = [name for name in self.stages if name != reader]
            head = first[0] if first else text
            self._fail(
                place,
                f"no stage {head!r} in this recipe{nearest(head, others)}; expected {_what_fits(declared)}",
            )
            return None
        if isinstance(reference, HubModel) and not _fits(HUB_KINDS, declared):
            what = f"takes {kinds_in_words(declared.kinds)}; a Hub name is a model"
            way = f"for data of the Hub use a normalize stage with `path: hub:{text}`"
            if "adapter" in declared.kinds:
                fetch = f"hf download {reference.name} --local-dir FOLDER"
                way = f"for an adapter of the Hub, `{fetch}`, and give the folder"
            self._fail(place, f"{what}; {way}")
            return None
        if isinstance(reference, Folder) and not self._folder_fits(place, reference, declared):
            return None
        self.wanted.append(Wanted(reader, place, reference, declared.kinds))
        return reference

    def _folder_fits(self, place: Place, reference: Folder, declared: Input) -> bool:
        try:
            kinds = folder_kinds(reference.path)
        except RequestError as error:
            self._fail(place, str(error))
            return False
        if not _fits(kinds, declared):
            self._fail(place, f"takes {kinds_in_words(declared.kinds)}, but {reference} is {kinds_in_words(kinds)}")
            return False
        return True

    def _stage_output(self, place: Place, text: str, declared: Input) -> Reference | None:
        name, dot, output = text.partition(".")
        outputs = self.stages[name].outputs()
        if outputs is None:
            # the stage is wrong and reported; a reference to its first output keeps the graph whole
            return StageOutput(name, output)
        if not outputs:
            self._fail(place, f"stage {name!r} writes nothing, as it is set")
            return StageOutput(name, output)
        if not dot:
            output = next(iter(outputs))
        if output not in outputs:
            way = nearest(output, outputs), self.stages[name].with_also(output, output)
            self._fail(
                place, f"stage {name!r} has no output {output!r}{way[0]}; it writes: {', '.join(outputs)}{way[1]}"
            )
            return StageOutput(name, output)
        if not _fits((outputs[output],), declared):
            fitting = [f"; did you mean '{name}.{other}'?" for other, kind in outputs.items() if kind in declared.kinds]
            hint = next(iter(fitting), "")
            if outputs[output] == "adapter" and "model" in declared.kinds:
                hint = "; make it a model with a stage `merge_adapter`, or with merge_adapters: true"
            elif "adapter" in declared.kinds and not fitting:
                hint = self.stages[name].with_also("adapter", "an adapter")
            takes, found_here = kinds_in_words(declared.kinds), kinds_in_words((outputs[output],))
            self._fail(place, f"takes {takes}, but {name}.{output} is {found_here}{hint}")
        return StageOutput(name, output)

    def _order(self) -> list[str]:
        """Names so that each stage follows those it reads from, else as written; cycles are reported, and come last."""
        order, cycles = ordered({name: set(sources(inputs)) for name, inputs in self.inputs.items()})
        for cycle in cycles:
            self._fail(
                ("stages", cycle[0], "inputs"),
                f"stages need each other in a circle: {' -> '.join([*cycle, cycle[0]])}; take one input out",
            )
        return order


def sources(inputs: Mapping[str, Iterable[Reference]]) -> tuple[str, ...]:
    """The stages of the recipe that these inputs are read from."""
    entries = (entry for entries in inputs.values() for entry in entries)
    return tuple(dict.fromkeys(entry.stage for entry in entries if isinstance(entry, StageOutput)))


def _fits(kinds: tuple[str, ...], declared: Input) -> bool:
    return not declared.kinds or bool(set(kinds) & set(declared.kinds))


def _what_fits(declared: Input) -> str:
    what = kinds_in_words(declared.kinds) if declared.kinds else "an artifact"
    words = f"{what}: a stage of this recipe, an @alias or @sha256:... of the store"
    return words + (", a Hub name or a folder" if _fits(HUB_KINDS, declared) else " or a folder (./x)")
