"""Compressed files of rows, unpacked as they are read."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO

DAMAGES = (EOFError, OSError, zlib.error)
"""What reading a damaged file raises; an OSError with a number is of the disk instead."""


def _zstd(path: Path) -> IO[bytes]:
    """Of several frames too, as parallel compressors write them."""
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


def _gzip(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb")  # type: ignore[return-value]


PACKINGS: dict[str, Callable[[Path], IO[bytes]]] = {".gz": _gzip, ".zst": _zstd}
"""Extension after that of the format -> the file as it was before it was compressed."""


def packing_of(path: str) -> str:
    """`.gz` of `train.jsonl.gz`; empty for a file that is not compressed."""
    return next((ending for ending in PACKINGS if path.endswith(ending)), "")
