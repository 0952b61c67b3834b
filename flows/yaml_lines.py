"""YAML in which every value knows its line, read by YAML 1.2's core rules.

Unlike PyYAML by default: `2e-5` is a number, `yes`, `no`, `on`, `off` and dates are text, `010` is ten, a key
given twice is an error.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from artifacts.errors import Problem, RequestError
from flows.document import Document, Place, dotted

_TAG = "tag:yaml.org,2002:"
_CORE = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
)
_HINTS = {"\t": " (indent with spaces, not tabs)", "@": " (put a name that begins with @ in quotes: '@mine/sft')"}
"""Characters that no token begins with, and what to do."""
_MOST_VALUES = 100_000
_MOST_CHARACTERS = 1_000_000
"""Of all texts together; writing a recipe down again takes a second for so many."""


class _CoreLoader(yaml.SafeLoader):
    """Composes nodes by the core rules; values are made below, not by PyYAML."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own interface


class _CoreDumper(yaml.SafeDumper):
    """Quotes exactly the text that the core rules would read as something else."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own interface

    def ignore_aliases(self, data: Any) -> bool:
        """Equal parts are written out twice: the record of a recipe is for people."""
        return True


for _name, _pattern, _first in _CORE:
    for _class in (_CoreLoader, _CoreDumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(f"^(?:{_pattern})$"), list(_first))


def read_document(path: Path) -> Document:
    """The YAML file at `path`, perhaps with mistakes of form. Raises RequestError when it cannot be read or is not
    YAML."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError([Problem(str(path), f"cannot be read as a text file: {error}")]) from error
    return _read(text, str(path))


def parse_document(text: str, origin: str) -> Document:
    """Text as a document; `origin` names it in messages. Raises RequestError with every problem of form."""
    document = _read(text, origin)
    if document.problems:
        raise RequestError(document.problems)
    return document


def _read(text: str, origin: str) -> Document:
    reader = _Reader(origin)
    data = reader.read(text)
    if reader.broken:
        raise RequestError(reader.problems)
    return Document(data, origin, reader.origins, tuple(reader.problems))


def parse_value(text: str, origin: str) -> Any:
    """One value in YAML, as `--set` gives it; a name that begins with @ needs no quotes, which a shell would eat."""
    if text.lstrip().startswith("@"):
        return text.strip()
    return parse_document(text, origin).data


def parse_values(text: str, origin: str) -> list[tuple[str, Any]]:
    """Values between commas, each with its text, which `parse_value` reads as the same."""
    listed = f"[{text}]"
    values = parse_value(listed, origin)
    node = _node(listed)
    if not isinstance(node, yaml.SequenceNode) or not isinstance(values, list):
        raise RequestError([Problem(origin, f"expected values between commas, found {text!r}")])
    texts = [listed[item.start_mark.index : item.end_mark.index].strip() for item in node.value]
    return list(zip(texts, values, strict=True))


def as_document(values: Any, origin: str) -> Document:
    """Values made in Python as a document without lines. Raises RequestError for what YAML cannot hold."""
    try:
        text = dump(values)
    except yaml.YAMLError as error:
        raise RequestError([Problem(origin, f"only text, numbers, booleans, lists and dicts: {error}")]) from error
    return Document(parse_document(text, origin).data, origin)


def dump(data: Any) -> str:
    """YAML that `parse_document` reads back to the same values, keys in the order given."""
    return yaml.dump(data, Dumper=_CoreDumper, sort_keys=False, allow_unicode=True, width=110)


def _node(text: str) -> yaml.Node | None:
    """The one document's root. Raises yaml.YAMLError, from the first character on."""
    loader = _CoreLoader(text)
    try:
        return loader.get_single_node()
    finally:
        loader.dispose()


class _Reader:
    """Turns PyYAML's nodes into values, noting lines and mistakes."""

    def __init__(self, origin: str) -> None:
        self.origin = origin
        self.origins: dict[Place, str] = {}
        self.problems: list[Problem] = []
        self.broken = False
        """Whether what could be read is not what was meant, so that nothing more is to be said of it."""
        self._values = 0
        self._characters = 0

    def read(self, text: str) -> Any:
        try:
            node = _node(text)
            return None if node is None else self._value(node, (), ())
        except yaml.MarkedYAMLError as error:
            self.broken = True
            mark = error.problem_mark or error.context_mark
            line = mark.line + 1 if mark else 1
            hint = next((text for character, text in _HINTS.items() if repr(character) in str(error.problem)), "")
            parts = [part for part in (error.context, error.problem) if part]
            self.problems.append(Problem(f"{self.origin}:{line}", f"not valid YAML: {', '.join(parts)}{hint}"))
        except yaml.YAMLError as error:
            self.broken = True
            words = " ".join(str(error).split())
            self.problems.append(Problem(self.origin, f"not valid YAML: {words}"))
        except RecursionError:
            self.broken = True
            self.problems.append(Problem(self.origin, "nested too deeply; a recipe needs some ten levels"))
        return None

    def _line(self, node: yaml.Node) -> str:
        return f"{self.origin}:{node.start_mark.line + 1}"

    def _fail(self, node: yaml.Node, place: Place, what: str) -> None:
        where = f"{self._line(node)}: {dotted(place)}" if place else self._line(node)
        self.problems.append(Problem(where, what, place))

    def _give_up(self, node: yaml.Node, place: Place, what: str) -> None:
        self.broken = True
        self._fail(node, place, what)

    def _value(self, node: yaml.Node, place: Place, above: tuple[yaml.Node, ...]) -> Any:
        self._values += 1
        if node in above:
            self._give_up(node, place, "an anchor contains itself")
            return None
        if self._values > _MOST_VALUES:
            if self._values == _MOST_VALUES + 1:
                self._give_up(node, place, f"more than {_MOST_VALUES} values, aliases expanded")
            return None
        if isinstance(node, yaml.ScalarNode):
            self._characters += len(node.value)
            if self._characters > _MOST_CHARACTERS:
                if self._characters - len(node.value) <= _MOST_CHARACTERS:
                    self._give_up(node, place, f"more than {_MOST_CHARACTERS} characters, aliases expanded")
                return None
        self.origins.setdefault(place, self._line(node))
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, place, (*above, node))
        if isinstance(node, yaml.SequenceNode):
            return [self._value(item, (*place, index), (*above, node)) for index, item in enumerate(node.value)]
        return self._scalar(node, place)

    def _mapping(self, node: yaml.MappingNode, place: Place, above: tuple[yaml.Node, ...]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _TAG + "merge":
                for source in value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]:
                    merged = {**self._merge_source(source, place, above), **merged}
                continue
            key = key_node.value
            if not isinstance(key, str) or key_node.tag != _TAG + "str":
                found = key if isinstance(key, str) else "a collection"
                self._fail(
                    key_node,
                    place,
                    f"keys are text; found {found}; write it in quotes if it is meant as text",
                )
                continue
            line = key_node.start_mark.line + 1
            if key in values:
                self._fail(key_node, (*place, key), f"given twice; the first is in line {lines[key]}; remove one")
                continue
            lines[key] = line
            self.origins[(*place, key)] = f"{self.origin}:{line}"
            values[key] = self._value(value_node, (*place, key), above)
        return {**merged, **values}

    def _merge_source(self, node: yaml.Node, place: Place, above: tuple[yaml.Node, ...]) -> dict[str, Any]:
        if isinstance(node, yaml.MappingNode) and node not in above:
            return self._mapping(node, place, (*above, node))
        self._fail(node, place, "`<<` takes a mapping that is defined elsewhere by an anchor")
        return {}

    def _scalar(self, node: yaml.Node, place: Place) -> Any:
        text = str(node.value)
        kind = node.tag.removeprefix(_TAG)
        try:
            if kind in ("str", "merge"):
                return text
            if kind == "null":
                return None
            if kind == "bool":
                return {"true": True, "false": False}[text.lower()]
            if kind == "int":
                return int(text, 0) if text[:2] in ("0x", "0o") else int(text)
            if kind == "float":
                return float(re.sub(r"\.(inf|nan)$", r"\1", text.lower()))
        except (ValueError, KeyError):
            self._fail(node, place, f"{text!r} does not fit its tag !!{kind}")
            return None
        self._fail(node, place, f"the tag {node.tag} means nothing here; write a plain value")
        return None
