"""Planted secrets, and a search for them in whatever a run leaves behind.

A canary is searched for as it is and in the ways in which text travels: quoted for a URL, escaped for JSON, as hex, in
base64 at each of three offsets, and in gzip members.
"""

from __future__ import annotations

import base64
import json
import re
import urllib.parse
import zlib
from collections.abc import Iterator
from pathlib import Path

NAMES = (
    "HF_TOKEN",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "OPENAI_API_KEY",
    "WANDB_API_KEY",
    "MLFLOW_TRACKING_PASSWORD",
    "PREFECT_API_KEY",
    "PREFECT_SERVER_API_AUTH_STRING",
    "GITHUB_TOKEN",
    "AZURE_STORAGE_ACCOUNT_KEY_SECRET",
    "GOOGLE_CREDENTIALS",
    "DATABASE_PASSWORD",
)
CANARIES = {name: f'cAnArY/{name.lower()}+Zq7=\\"é{number:02}' for number, name in enumerate(NAMES)}
"""Environment variable -> its secret, with characters that each encoding writes differently."""


def leaks(folder: Path, texts: dict[str, str], secrets: dict[str, str] = CANARIES) -> list[str]:
    """`file: variable as encoding` of every secret found in the files under `folder` and in `texts`."""
    forms = [(name, how, form) for name, secret in secrets.items() for how, form in encodings(secret)]
    places = {str(path.relative_to(folder)): path.read_bytes() for path in _files(folder)}
    places |= {name: text.encode() for name, text in texts.items()}
    return [
        f"{place}: {name} as {how}"
        for place, content in places.items()
        for plain in (content, *_unpacked(content))
        for name, how, form in forms
        if form in plain
    ]


def encodings(secret: str) -> Iterator[tuple[str, bytes]]:
    """(name, bytes that give the secret away) of each way in which it may be written."""
    raw = secret.encode()
    yield "text", raw
    yield "a quoted URL", urllib.parse.quote(secret, safe="").encode()
    yield "a URL with slashes", urllib.parse.quote(secret).encode()
    yield "JSON", json.dumps(secret)[1:-1].encode()
    yield "JSON of plain characters", json.dumps(secret, ensure_ascii=False)[1:-1].encode()
    yield "hex", raw.hex().encode()
    for offset in range(3):
        # of the first and last group of four only the inner part is the secret's
        yield f"base64 at offset {offset}", base64.b64encode(b"\0" * offset + raw)[4 * (offset > 0) : -4]


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


_GZIP = re.compile(rb"\x1f\x8b\x08")


def _unpacked(content: bytes) -> Iterator[bytes]:
    for member in _GZIP.finditer(content):
        try:
            yield zlib.decompressobj(wbits=31).decompress(content[member.start() :])
        except zlib.error:
            continue
