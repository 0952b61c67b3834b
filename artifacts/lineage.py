"""Where an artifact comes from, read from the manifests."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from artifacts.digest import is_sha256
from artifacts.errors import DamagedError, MissingError, RequestError
from artifacts.manifest import Artifact, Manifest

LARGEST, DEEPEST = 1000, 100
"""Of a tree, in artifacts: a few manifests that name each other twice would fill any memory."""


def tree(
    artifact: Artifact,
    manifest: Callable[[Artifact], Manifest],
    artifacts: Callable[[str], Iterable[Artifact]],
) -> dict[str, Any]:
    """`{"artifact", "kind", "stage", "fingerprint", "inputs": {name: tree}}`; a list of inputs gives a list
    of trees. What is outside the store (a path, a Hub model) or no longer there is a leaf that says so."""
    left = LARGEST

    def grow(node: Artifact, above: tuple[Artifact, ...]) -> dict[str, Any]:
        nonlocal left
        left -= 1
        leaf: dict[str, Any] = {"artifact": node.id, "kind": node.kind, "stage": None, "fingerprint": None}
        if node in above:
            # a stage that wrote the bytes it had read
            return {**leaf, "note": "the same content as further up", "inputs": {}}
        if left <= 0 or len(above) >= DEEPEST:
            return {**leaf, "note": "what it was made of is left out: the tree is too large", "inputs": {}}
        try:
            producer = manifest(node).producer
        except (MissingError, DamagedError) as error:
            return {**leaf, "note": str(error), "inputs": {}}
        inputs = producer.get("inputs") or {}
        return {
            **leaf,
            "stage": producer.get("stage"),
            "fingerprint": producer.get("fingerprint"),
            "inputs": {name: branch(value, (*above, node)) for name, value in inputs.items()},
        }

    def branch(value: Any, above: tuple[Artifact, ...]) -> Any:
        if isinstance(value, list):
            return [branch(item, above) for item in value]
        source = _referred(value, resolve)
        return grow(source, above) if source is not None else {"source": value, "inputs": {}}

    def resolve(digest: str) -> Artifact | None:
        return next(iter(artifacts(digest)), None)

    return grow(artifact, ())


def _referred(value: Any, resolve: Callable[[str], Artifact | None]) -> Artifact | None:
    """The artifact that an input names: an id, or a mapping with `artifact`, `id` or `digest`, and `kind`."""
    if isinstance(value, str):
        value = {"id": value}
    if not isinstance(value, dict) or "path" in value or "hub" in value:
        return None
    name = str(value.get("artifact") or value.get("id") or value.get("digest") or "")
    digest = name.removeprefix("sha256:")
    if not is_sha256(digest):
        return None
    if "kind" not in value:
        return resolve(digest)
    try:
        return Artifact.from_json({"kind": value["kind"], "id": digest})
    except RequestError:
        return None
