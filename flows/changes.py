"""Why a stage is not cached: what differs between two identities, field by field, in words."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ABSENT = object()
_SHORT = 60
_CODE = {"function", "sha256"}
_DATA = ({"sha256"}, {"sha256", "suffix"}, {"hub", "revision"})


@dataclass(frozen=True)
class Change:
    """One difference. `kind` is version, config or input; `name` the dotted field or the input."""

    kind: str
    name: str
    old: Any
    new: Any

    @property
    def what(self) -> str:
        """version, field, seed, code, data or input."""
        if self.kind != "config":
            return self.kind
        if is_external(self.new) or is_external(self.old):
            value = self.new if is_external(self.new) else self.old
            return "code" if set(value) == _CODE else "data"
        return "seed" if self.name.rpartition(".")[2].endswith("seed") else "field"

    def to_json(self) -> dict[str, Any]:
        """`old` or `new` is missing where there was, or is, none."""
        values = {side: value for side in ("old", "new") if (value := getattr(self, side)) is not _ABSENT}
        return {"what": self.what, "name": self.name, **values}

    def words(self, config: Mapping[str, Any] | None = None) -> str:
        """`with.beta: 0.1 -> 0.2`; `config` has the names of files, which identities do not hold."""
        if self.kind == "version":
            return f"stage version {self.old} -> {self.new}"
        if self.kind == "input":
            return f"input {self.name}: {short_digest(self.old)} -> {short_digest(self.new)}"
        if is_external(self.old) and is_external(self.new):
            what = "code" if set(self.new) == _CODE else "data"
            same = self.old.get("function") == self.new.get("function")
            if same and set(self.old) == set(self.new):
                return f"{what} of {_written(config, self.name) or f'with.{self.name}'} changed"
        return f"with.{self.name}: {_value(self.old)} -> {_value(self.new)}"


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """The differences between two identities: version, fields, inputs."""
    old, new = _plain(old), _plain(new)
    found = []
    if old["version"] != new["version"]:
        found.append(Change("version", "version", old["version"], new["version"]))
    before, after = dict(leaves(old["config"])), dict(leaves(new["config"]))
    found += _differences("config", before, after)
    return found + _differences("input", old["inputs"], new["inputs"])


def nearest_identities(
    new: Mapping[str, Any], identities: Iterable[Mapping[str, Any]]
) -> list[tuple[int, list[Change]]]:
    """Index and differences of the identities with the fewest of them, in their order."""
    compared = [changes(old, new) for old in identities]
    fewest = min(map(len, compared), default=0)
    return [(index, found) for index, found in enumerate(compared) if len(found) == fewest]


def short_digest(digest: Any) -> str:
    """The first letters of a digest or of each of several."""
    if digest is _ABSENT:
        return "none"
    if isinstance(digest, list):
        return f"[{', '.join(map(short_digest, digest))}]"
    return str(digest) if str(digest).startswith("hub:") else str(digest)[:8]


def _plain(identity: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(identity))


def _differences(kind: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    names = [*new, *(name for name in old if name not in new)]
    pairs = [(name, old.get(name, _ABSENT), new.get(name, _ABSENT)) for name in names]
    return [Change(kind, name, before, after) for name, before, after in pairs if before != after]


def is_external(value: Any) -> bool:
    """Whether a value of an identity stands for a file, a function or a Hub name, by content."""
    return isinstance(value, dict) and (set(value) == _CODE or set(value) in _DATA)


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of everything in nested JSON; what stands for a file, a function or a Hub name is whole."""
    if isinstance(value, dict) and value and not is_external(value):
        for key, inner in value.items():
            yield from leaves(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
        for index, entry in enumerate(value):
            yield from leaves(entry, f"{name}.{index}")
    else:
        yield name, value


def _value(value: Any) -> str:
    if value is _ABSENT:
        return "(not there)"
    if isinstance(value, str):
        text = value
    elif is_external(value):
        text = str(value.get("function") or value.get("hub") or f"content {value['sha256'][:8]}")
    else:
        text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHORT else f"{text[: _SHORT - 3]}..."


def _written(config: Mapping[str, Any] | None, name: str) -> str | None:
    """The reference as the configuration has it, without folders."""
    value: Any = config
    for part in name.split("."):
        if isinstance(value, Mapping):
            value = value.get(part)
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return Path(value).name if isinstance(value, str) else None
