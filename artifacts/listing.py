"""Which artifacts a store has, from its lists alone."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from artifacts.digest import is_sha256
from artifacts.errors import DamagedError, RequestError
from artifacts.files import Files
from artifacts.manifest import Artifact

logger = logging.getLogger(__name__)


def newest_first(files: Files, kind: str | None = None) -> list[Artifact]:
    """Every artifact (of a kind), the one stored last first; what never was finished may be among them."""
    found = []
    for name in files.children("artifacts"):
        if kind in (None, name):
            changed = files.changed(f"artifacts/{name}")
            found += [(when, name, digest) for digest, when in changed.items() if is_sha256(digest)]
    return [Artifact(name, digest) for _, name, digest in sorted(found, reverse=True)]


def marked(files: Files, marker: str, prefix: str = "") -> Iterator[Artifact]:
    """Every artifact that has a file `marker` and whose digest begins so, by kind and digest."""
    for kind in files.children("artifacts"):
        for digest in [prefix] if is_sha256(prefix) else files.children(f"artifacts/{kind}"):
            if not digest.startswith(prefix):
                continue
            try:
                artifact = Artifact(kind, digest)
            except RequestError:
                logger.warning("%s/artifacts/%s/%s is nothing of ours", files.url, kind, digest)
                continue
            if _has(files, artifact, marker):
                yield artifact


def _has(files: Files, artifact: Artifact, marker: str) -> bool:
    """Where that cannot be told, whoever reads the file is told why."""
    try:
        return marker in files.children(artifact.key)
    except DamagedError:
        return artifact.digest in files.children(f"artifacts/{artifact.kind}")
