"""Sealed JSON: small files that say themselves whether they are whole.

No JSON reader notices a flipped digit, so every JSON object in the store holds the SHA-256 of the rest of it.
"""

from __future__ import annotations

import json
import math
import os
import re
import urllib.parse
from collections.abc import Mapping
from typing import Any

from artifacts.digest import canonical_json, sha256_bytes
from artifacts.errors import DamagedError, StoreError

SEAL = "seal"
LARGEST_BYTES = 64 * 2**20
"""Of a sealed file: hundreds of thousands of names. Parsed, JSON takes many times its size in memory."""
SECRET_NAME = re.compile(
    r"SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_KEY|AUTH(?!OR(?!I[SZ]))", re.IGNORECASE
)
"""AUTH, but no AUTHOR: people's names are no secrets, and stand in much that is kept."""
SHORTEST_SECRET = 12
USERINFO = re.compile(r"(?<=://)[^/@\s'\"]+@")
AUTHORIZATION = re.compile(r"(?i)(authorization['\"]?\s*[:=]\s*['\"]?(?:bearer|basic|token)\s+)[^\s'\",}]+")
SIGNED_QUERY = re.compile(r"(?i)\b(X-Amz-(?:Signature|Credential|Security-Token)|AWSAccessKeyId|Signature)=[^&\s'\"]+")

_BEGUN = re.compile(
    r"(?i)(?:://[^/@\s'\"]*|authorization['\"]?[ \t]*(?:[:=][ \t]*['\"]?(?:\w+(?:[ \t]+[^\s'\",}]*)?)?)?"
    r"|(?:X-Amz-\w+(?:-Token)?|AWSAccessKeyId|Signature)=[^&\s'\"]*)\Z"
)
"""At the end of a text: what may become one of the three above."""


def seal(payload: Mapping[str, Any]) -> bytes:
    """The file of a payload. Numbers that JSON does not have (NaN, infinities) become null; live secrets of
    the environment and passwords in URLs become `***`."""
    body = publishable(payload)
    assert SEAL not in body
    data = _render({**body, SEAL: sha256_bytes(canonical_json(body))})
    if len(data) > LARGEST_BYTES:
        raise StoreError(f"{len(data)} bytes of manifest or record are too many: {LARGEST_BYTES} can be read again")
    return data


def unseal(data: bytes, where: str) -> dict[str, Any]:
    """The payload of a sealed file. Raises DamagedError, naming `where`, if any byte is not as written."""
    if len(data) > LARGEST_BYTES:
        raise DamagedError(f"{where} is damaged ({len(data)} bytes; no manifest or record has so many)")
    try:
        value = json.loads(data.decode("utf-8"))
        body = {key: item for key, item in value.items() if key != SEAL}
        whole = value[SEAL] == sha256_bytes(canonical_json(body)) and data == _render(value)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise DamagedError(f"{where} is damaged ({len(data)} bytes that are not what was written); run it again")
    return body


def _render(value: Mapping[str, Any]) -> bytes:
    text = json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8") + b"\n"


def publishable(value: Any) -> Any:
    """`value` as it may be written: plain JSON, without NaN and without secrets."""
    return _publishable(value, _live_secrets())


def _publishable(value: Any, secrets: tuple[str, ...]) -> Any:
    if isinstance(value, Mapping):
        return {_without(str(key), secrets): _publishable(item, secrets) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_publishable(item, secrets) for item in value]
    if isinstance(value, str):
        # a lone surrogate cannot be written as UTF-8
        return _without(value.encode("utf-8", "replace").decode("utf-8"), secrets)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    raise TypeError(f"not JSON: {value!r} ({type(value).__name__})")


def scrub(text: str) -> str:
    """`text` without passwords in URLs, signatures of signed URLs and secrets of the environment."""
    return _without(SIGNED_QUERY.sub(r"\1=***", text), _live_secrets())


def settled(text: str) -> int:
    """How many letters of `text` may be scrubbed and shown before its continuation is known: what is left may be the
    beginning of a secret, or of one of the forms in which people pass them."""
    secrets = _live_secrets()
    end = _before_secrets(text, secrets)
    if begun := _BEGUN.search(text):
        end = min(end, begun.start())
    return _between(text, end, secrets)


def scrub_last(text: str) -> str:
    """`scrub` for the end of an output: a large part of a secret, cut off there, is no more shown than the whole."""
    secrets = _live_secrets()
    end = _between(text, _before_secrets(text, secrets), secrets)
    return scrub(text[:end]) + "***" if len(text) - end >= SHORTEST_SECRET else scrub(text)


def _before_secrets(text: str, secrets: tuple[str, ...]) -> int:
    """Where the longest end of the text begins that is the beginning of a secret."""
    begun = (
        next((size for size in range(min(len(secret) - 1, len(text)), 0, -1) if text.endswith(secret[:size])), 0)
        for secret in secrets
    )
    return len(text) - max(begun, default=0)


def _between(text: str, end: int, secrets: tuple[str, ...]) -> int:
    """The last place up to `end` that cuts no whole secret in two."""
    cut = True
    while cut:
        cut = False
        for secret in secrets:
            start = text.find(secret, max(0, end - len(secret) + 1), end + len(secret) - 1)
            if 0 <= start < end:
                end, cut = start, True
    return end


def _without(text: str, secrets: tuple[str, ...]) -> str:
    for secret in secrets:
        text = text.replace(secret, "***")
    return AUTHORIZATION.sub(r"\1***", USERINFO.sub("***@", text))


def _live_secrets() -> tuple[str, ...]:
    """Values of environment variables whose names say that they are secret; longest first, so that a secret
    that contains another leaves nothing behind."""
    values = {
        value
        for name, value in os.environ.items()
        if SECRET_NAME.search(name) and len(value) >= SHORTEST_SECRET and not os.path.isabs(value)
    }
    forms = values | {form for value in values for form in _written_forms(value)}
    return tuple(sorted(forms, key=len, reverse=True))


def _written_forms(secret: str) -> tuple[str, ...]:
    """How messages quote a text: as Python does, as JSON does, and as a part of a URL."""
    quoted = repr(secret)[1:-1], json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1]
    return *quoted, urllib.parse.quote(secret), urllib.parse.quote(secret, safe="")
