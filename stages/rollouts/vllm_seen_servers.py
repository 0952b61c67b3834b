"""Servers that the first process of a stage has started, as every process of it sees them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor

from stages.rollouts.vllm_connection import Address, ServerFailure


class SeenServers:
    """As a process sees them that has not started them, but knows their folder."""

    def __init__(
        self,
        folder: Path,
        count: int,
        hint: str = "the first process started it, and has its log",
        adapter: str | None = None,
    ) -> None:
        """`adapter`: name of the one that they apply."""
        self.folder, self.count = folder, count
        self.run, self.weights_name = folder.name, ""
        self.addresses: Sequence[Address] = [
            Address(
                folder.name,
                socket=folder / str(number) / "socket",
                label=_label(number, count),
                adapter=adapter,
                hint=hint,
            )
            for number in range(count)
        ]

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Whoever started them sends weights."""
        raise AssertionError("the first process sends weights")

    def absent(self) -> dict[int, str]:
        """Those that are not started again any more."""
        found = {number: self.broke_off(number) for number in range(self.count)}
        return {number: reason for number, reason in found.items() if reason is not None}

    def broke_off(self, server: int, error: ServerFailure | None = None) -> str | None:
        """What its end was, where it was the last one."""
        note = self._note(server)
        return note.read_text(encoding="utf-8") if note.exists() else None

    def doubt(self, server: int) -> str | None:
        """None: who answers has the weights of the moment."""
        return None

    def restarts(self) -> list[int]:
        """Not known here."""
        return [0] * self.count

    def _note(self, server: int) -> Path:
        return self.folder / f"{server}.gone"


def _label(number: int, count: int) -> str:
    return "the vLLM server" if count == 1 else f"vLLM server {number + 1} of {count}"
