"""A teacher's hidden states as files, from which a student is taught without the teacher.

`states.safetensors`: `states` [N, H], row after row, where the asked-for tokens are predicted, in the type that they
were computed in. `rows.parquet`: of every row its id, its number of asked-for tokens, their log-probability under the
teacher, and the SHA-256 of its tokens. `head.safetensors` and `head.json`: what makes logits of the states.
`teacher.json`: whose they are. With the teacher's `config.json` and its tokenizer.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from artifacts.errors import StageError
from stages.data.dataset import read_parquet
from stages.losses.head import Head
from stages.training.batch import Group
from stages.training.language_modeling import asked_tokens
from stages.training.row_digest import tokens_sha256

_STATES, _ROWS, _HEAD, _FORM = "states.safetensors", "rows.parquet", "head.safetensors", "head.json"
_TEACHER = "teacher.json"
_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}
"""In the words of safetensors' header."""


class StateFiles:
    """The files of an artifact, states read from the disk when they are asked for."""

    def __init__(self, folder: Path, name: str) -> None:
        """`name`: of the input that they are."""
        rows = read_parquet(folder / _ROWS).to_pydict()
        stops = list(accumulate(rows["tokens"], initial=0))
        self._folder, self._name = folder, name
        self._places = dict(zip(rows["row_id"], pairwise(stops), strict=True))
        self._digests: dict[str, str] = dict(zip(rows["row_id"], rows["sha256"], strict=True))
        self._file = safe_open(folder / _STATES, "pt")
        self._states = self._file.get_slice("states")
        self._head, self._form = load_file(folder / _HEAD), json.loads((folder / _FORM).read_text(encoding="utf-8"))

    def head(self, temperature: float) -> Head:
        """The teacher's."""
        return Head(self._head["weight"], self._head.get("bias"), temperature=temperature, **self._form)

    @property
    def teacher(self) -> str:
        """The digest of the model whose states they are."""
        return str(json.loads((self._folder / _TEACHER).read_text(encoding="utf-8"))["digest"])

    def states(self, place: slice) -> Tensor:
        """[n, H] of one row."""
        states: Tensor = self._states[place]
        return states

    def places(self, groups: Sequence[Group]) -> list[slice]:
        """Where their states are. Raises StageError where there are none of a row, or those of other tokens."""
        missing = [group.row_id for group in groups if group.row_id not in self._digests]
        if missing:
            raise StageError(
                f"input {self._name} has nothing of {len(missing)} of {len(groups)} rows, the first is {missing[0]}; "
                f"it has {len(self._digests)} rows: run teacher_states on this very dataset, with the same max_length"
            )
        others = [group for group in groups if self._digests[group.row_id] != tokens_sha256(group)]
        if others:
            start, stop = self._places[others[0].row_id]
            raise StageError(
                f"input {self._name} has {len(others)} of {len(groups)} rows with other tokens, the first is "
                f"{others[0].row_id}, of which it has {stop - start} trained tokens where there are "
                f"{asked_tokens(others[0])}: run teacher_states with the same max_length, and a teacher with the "
                "student's tokenizer and chat template"
            )
        return [slice(*self._places[group.row_id]) for group in groups]


def write_states(folder: Path, parts: Iterable[Tensor], shape: tuple[int, int], dtype: torch.dtype) -> None:
    """The states [N, H] = `shape`, of which `parts` [n, H] are one after another, and never all in memory."""
    size = shape[0] * shape[1] * dtype.itemsize
    entry = {"dtype": _TYPES[dtype], "shape": list(shape), "data_offsets": [0, size]}
    header = json.dumps({"states": entry}).encode()
    header += b" " * (-len(header) % 8)  # so that the states begin at a multiple of eight bytes
    written = 0
    with open(folder / _STATES, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for part_NH in parts:
            written += file.write(part_NH.contiguous().view(torch.uint8).numpy().data)
    assert written == size, "the parts are not of this shape"


def write_rows(folder: Path, groups: Sequence[Group], logps: Sequence[float]) -> None:
    """What there is of every row; `logps`: its log-probability."""
    import pyarrow
    import pyarrow.parquet as parquet

    columns = {
        "row_id": [group.row_id for group in groups],
        "tokens": [asked_tokens(group) for group in groups],
        "logps": logps,
        "sha256": [tokens_sha256(group) for group in groups],
    }
    parquet.write_table(pyarrow.table(columns), folder / _ROWS, write_page_checksum=True)


def write_head(folder: Path, head: Head, teacher: str) -> None:
    """A head without temperature, and the digest of the `teacher` that it is of."""
    tensors = {"weight": head.weight_VH} | ({} if head.bias_V is None else {"bias": head.bias_V})
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / _HEAD)
    form = {"scale": head.scale, "softcap": head.softcap}
    (folder / _FORM).write_text(json.dumps(form), encoding="utf-8")
    (folder / _TEACHER).write_text(json.dumps({"digest": teacher}), encoding="utf-8")
