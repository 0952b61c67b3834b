"""Work on many rows in pieces that survive a kill: each piece is computed once, by one process, and saved."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import gather_object

from artifacts import Shards
from artifacts.errors import DamagedError, MissingError
from stages.context import Context

Item = TypeVar("Item")


def in_shards(
    context: Context,
    accelerator: Accelerator,
    name: str,
    items: Sequence[Item],
    compute: Callable[[Sequence[Item]], list[dict[str, Any]]],
    *,
    size: int,
    equally_often: bool = False,
) -> list[dict[str, Any]]:
    """One JSON object an item, in order, on every process; otherwise as `save_pieces`."""

    def piece(part: Sequence[Item]) -> bytes:
        rows = compute(part)
        assert len(rows) == len(part)
        return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode()

    names = save_pieces(context, accelerator, name, items, piece, size=size, equally_often=equally_often)
    return [json.loads(line) for name in names for line in context.shards.load(name).decode().splitlines()]


def save_pieces(
    context: Context,
    accelerator: Accelerator,
    name: str,
    items: Sequence[Item],
    compute: Callable[[Sequence[Item]], bytes],
    *,
    size: int,
    equally_often: bool = False,
) -> list[str]:
    """The names, in order, of shards that hold what `compute` makes of `size` items at a time, all of them finished.
    `equally_often`: it is called on every process as often as on any other, in the end with no items.

    A piece depends on its own items only, so neither a resume nor the number of processes changes a byte.
    """
    shards, total = context.shards, len(items)
    starts = range(0, total, size)
    # by what is in them: a run that is taken up may cut the rows in another way
    names = [f"{name}-{start:08d}-{min(start + size, total):08d}" for start in starts]
    mine = range(accelerator.process_index, len(names), accelerator.num_processes)
    there = shards.names()
    finished = {names[number] for number in mine if names[number] in there and _intact(shards, names[number])}
    if finished:
        context.resumed(min(total, len(finished) * accelerator.num_processes * size))
    idle = 0
    if equally_often and accelerator.num_processes > 1:  # settled first, for others wait for each call of `compute`
        idle = max(gather_object([calls := len(mine) - len(finished)])) - calls
    before = context.tokens
    for number in mine:
        start, stop = number * size, min((number + 1) * size, total)
        if names[number] not in finished:
            piece = compute(items[start:stop])
            context.held.require_unchanged()
            shards.save(names[number], piece)
        context.progress(stop, total, unit="row")
    for _ in range(idle):
        compute([])
    accelerator.wait_for_everyone()
    if accelerator.num_processes > 1:
        context.tokens = before + sum(gather_object([context.tokens - before]))
    return names


def _intact(shards: Shards, name: str) -> bool:
    try:
        shards.load(name)
    except MissingError:  # it was listed, and is not there any more
        return False
    except DamagedError as error:
        logging.warning("%s", error)
        return False
    return True
