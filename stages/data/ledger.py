"""The row ledger: every input row ends in exactly one state, and the states sum to the input; so do their tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from artifacts.digest import canonical_json
from artifacts.errors import StageError

if TYPE_CHECKING:
    from stages.context import Context

EXAMPLES = 5
"""Examples kept of each state and of each change."""

LEDGER_FILE = "ledger.json"


class RowLedger:
    """Counts what became of rows. States: `used`, `truncated` (used, but cut), `masked`, `duplicate`,
    `filtered: <reason>`, ... A change (a field left out, an unknown token) is no state: the row stays."""

    def __init__(self) -> None:
        self.states: Counter[str] = Counter()
        self.changes: Counter[str] = Counter()
        self.truncated_tokens = 0
        self.tokens: Counter[str] = Counter()
        """Where rows are known as tokens, what became of these: `used`, `truncated` (cut off), or their row's state."""
        self._token_rows = 0
        self._examples: dict[str, list[dict[str, str]]] = {}

    def use(self, rows: int | str = 1, *, tokens: int | None = None) -> None:
        """`rows` rows (or the one row with that id, of so many tokens) are used whole."""
        self._count("used", rows if isinstance(rows, int) else 1)
        self._count_tokens(used=tokens)

    def drop(self, row_id: str, state: str, detail: str = "", *, tokens: int | None = None) -> None:
        """The row, of so many tokens, is not used, because of `state`."""
        self._count(state, 1)
        self._count_tokens(**{state: tokens})
        self._example(state, row_id, detail)

    def take_back(self, row_id: str, state: str, detail: str = "", *, tokens: int | None = None) -> None:
        """The row, of so many tokens, counted as used, but nothing of it was, because of `state`."""
        assert self.states["used"] > 0 and self.tokens["used"] >= (tokens or 0)
        self.states = self.states + Counter({state: 1}) - Counter(used=1)  # without what has become 0
        if tokens is not None:
            self.tokens.update({"used": -tokens, state: tokens})
        self._example(state, row_id, detail)

    def move(self, rows: int, state: str) -> None:
        """`rows` rows are elsewhere (the other split)."""
        self._count(state, rows)

    def truncate(self, row_id: str, tokens: int, *, kept: int | None = None) -> None:
        """The row is used without `tokens` of its tokens; `kept` are left."""
        assert tokens > 0
        self._count("truncated", 1)
        self.truncated_tokens += tokens
        self._count_tokens(used=kept, truncated=None if kept is None else tokens)
        self._example("truncated", row_id, f"{tokens} tokens cut")

    def mask_part(self, row_id: str, tokens: int) -> None:
        """`tokens` of a row that is used otherwise are left out: there is nothing to train among them."""
        assert 0 < tokens <= self.tokens["used"]
        self.tokens.update(used=-tokens, masked=tokens)
        self.change("parts of rows without a trained token", row_id, f"{tokens} tokens left out")

    def change(self, reason: str, row_id: str, detail: str = "", count: int = 1) -> None:
        """Something in the row was changed `count` times; says nothing about the row's state."""
        self.changes[reason] += count
        self._example(reason, row_id, detail)

    @property
    def input(self) -> int:
        """Rows that have a state."""
        return sum(self.states.values())

    def check(self, total: int) -> None:
        """Raises StageError unless each of `total` rows got exactly one state."""
        if self.input != total:
            raise StageError(f"row ledger: {total} rows came in, {self.input} have a state: {dict(self.states)}")

    def to_json(self) -> dict[str, Any]:
        told = {
            "input": self.input,
            "states": dict(sorted(self.states.items())),
            "changes": dict(sorted(self.changes.items())),
            "truncated_tokens": self.truncated_tokens,
            "examples": {name: list(self._examples[name]) for name in sorted(self._examples)},
        }
        if self._token_rows:
            states = {name: count for name, count in sorted(self.tokens.items()) if count}
            told["tokens"] = {"rows": self._token_rows, "input": sum(states.values()), "states": states}
        return told

    def write(self, folder: Path) -> None:
        """Writes `ledger.json` into `folder`."""
        (folder / LEDGER_FILE).write_bytes(canonical_json(self.to_json()) + b"\n")

    def summary(self) -> str:
        """`90 used, 10 duplicate`."""
        return ", ".join(f"{count} {state}" for state, count in self.states.most_common())

    def _count(self, state: str, rows: int) -> None:
        assert rows >= 0
        if rows:
            self.states[state] += rows

    def _count_tokens(self, **counts: int | None) -> None:
        known = {state: count for state, count in counts.items() if count is not None}
        assert all(count >= 0 for count in known.values())
        self.tokens.update(known)
        self._token_rows += bool(known)

    def _example(self, name: str, row_id: str, detail: str) -> None:
        examples = self._examples.setdefault(name, [])
        if len(examples) < EXAMPLES:
            examples.append({"row": row_id, "detail": detail})


def say_dropped(
    context: Context, states: Mapping[str, int], kept: Mapping[str, int] | None = None, *, output: str = ""
) -> None:
    """Logs what a ledger's `states` say was dropped or cut: `400 rows: 48 train, 50 test; 302 dropped: duplicate`,
    `400 rows: 350 used, 50 truncated`; nothing where nothing was. `kept`: rows by output, where the states do not have
    them; `output`: the one that it is about."""
    dropped = {state: count for state, count in states.items() if not _is_kept(state)}
    if not dropped and not any(_kind(state) == "truncated" for state in states):
        return
    if kept is None:
        kept = Counter()
        for state in filter(_is_kept, states):
            kept[_kind(state)] += states[state]
    rows = sum(kept.values()) + sum(dropped.values())
    left = ", ".join(f"{count} {name}" for name, count in kept.items()) or "none left"
    causes = sorted(dropped.items(), key=lambda item: (-item[1], item[0]))
    why = causes[0][0] if len(causes) == 1 else ", ".join(f"{count} {state}" for state, count in causes)
    gone = f"; {sum(dropped.values())} dropped: {why}" if dropped else ""
    context.log(f"{output}{output and ': '}{rows} rows: {left}{gone}")


def _is_kept(state: str) -> bool:
    return _kind(state) in ("used", "truncated")


def _kind(state: str) -> str:
    """Of `used: <by one task, not by another>`, `used`."""
    return state.partition(":")[0]
