"""One byte sequence for one JSON value: what row digests, ledgers and dataset descriptions are written as."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def canonical_bytes(value: Any) -> bytes:
    """UTF-8 JSON, sorted keys, no spaces. Raises ValueError for NaN, infinities and lone surrogates."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def canonical_digest(value: Any) -> bytes:
    """SHA-256 (32 bytes) of `canonical_bytes`."""
    return hashlib.sha256(canonical_bytes(value)).digest()
