"""What every token of a tokenizer stands for in bytes of text, and where the tokens of a text are in it.

Bytes are what two tokenizers share: characters are split over tokens by byte-level ones, and offsets in characters then
lie on top of one another.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from artifacts.errors import DataError

Piece = str | bytes
Step = Callable[[Piece], Piece]


class Span(NamedTuple):
    """Bytes of a text, from the first to behind the last."""

    start: int
    stop: int


class Misread(NamedTuple):
    """Where a text and the tokens that were made of it differ."""

    token: int
    """Its place among the tokens."""
    detail: str


class TokenBytes:
    """The bytes of every token."""

    def __init__(self, tokenizer: Any) -> None:
        """Raises DataError for a tokenizer whose tokens are no pieces of the text."""
        if not tokenizer.is_fast:
            raise DataError(f"a fast tokenizer (tokenizer.json) is needed to compare tokens, not {type(tokenizer)}")
        steps = _steps(tokenizer.backend_tokenizer.decoder)
        added = {token: entry.content for token, entry in tokenizer.added_tokens_decoder.items()}
        self.added = frozenset(added)
        count = max(tokenizer.get_vocab().values(), default=-1) + 1  # more than it has tokens, where ids are left out
        names: list[str | None] = tokenizer.convert_ids_to_tokens(list(range(count)))
        self.pieces = [
            added[token].encode() if token in added else _piece_bytes(name, steps) for token, name in enumerate(names)
        ]
        self._fallbacks = {token for token, name in enumerate(names) if name is not None and _is_byte(name)}

    def joined(self, token_ids: Sequence[int]) -> bytes:
        """The text of tokens."""
        return b"".join(map(self.piece, token_ids))

    def piece(self, token: int) -> bytes:
        """The bytes of a token that a model may write: none where a padded head has it and the tokenizer does not."""
        return self.pieces[token] if token < len(self.pieces) else b""

    def spans(self, token_ids: Sequence[int], text: bytes) -> tuple[list[Span], Misread | None]:
        """Where in `text` the tokens are that a tokenizer made of it; up to the first that is not there, if any.

        A token that is no part of the text, such as a start token, takes no bytes. The space that some tokenizers put
        before a text is none of it.
        """
        found: list[Span] = []
        place, at_start = 0, True  # of the text, or of what stands behind an added token
        for number, token in enumerate(token_ids):
            span = self._span(token, text, place, at_start=at_start)
            if span is None:
                return found, Misread(number, self._difference(token, text, place))
            found.append(span)
            at_start = token in self.added or (at_start and not text[span.start : span.stop].strip())
            place = span.stop
        return found, None

    def _span(self, token: int, text: bytes, place: int, *, at_start: bool) -> Span | None:
        piece = self.pieces[token]
        is_added = token in self.added
        if text.startswith(piece, place):
            return Span(place, place + len(piece))
        if at_start and not is_added and piece[:1] == b" " and text.startswith(piece[1:], place):
            return Span(place, place + len(piece) - 1)
        if is_added or at_start:  # these may take white space beside them along
            start = place
            while text[start : start + 1].isspace():
                start += 1
            if text.startswith(piece, start):
                return Span(place, start + len(piece))
        return Span(place, place) if is_added else None

    def _difference(self, token: int, text: bytes, place: int) -> str:
        piece = self.pieces[token]
        there = text[place : place + max(len(piece), 12)]
        return f"it reads {_shown(piece)} where the text goes on with {_shown(there)} (byte {place})"

    def by_bytes(self) -> dict[tuple[bool, bytes], int]:
        """(whether it is an added token, its bytes) -> the token; of several that are alike the first, and those that
        stand for single bytes of what has no other token last."""
        order = sorted(range(len(self.pieces)), key=lambda token: (token in self._fallbacks, token))
        found: dict[tuple[bool, bytes], int] = {}
        for token in order:
            if self.pieces[token]:
                found.setdefault((token in self.added, self.pieces[token]), token)
        return found


def same_tokens(student: TokenBytes, teacher: TokenBytes, ends: tuple[int | None, int | None]) -> list[tuple[int, int]]:
    """(student's token, teacher's token) of equal bytes, by the student's; and the two that end a text (`ends`), where
    these have no other counterpart."""
    theirs = teacher.by_bytes()
    pairs = {token: theirs[key] for key, token in student.by_bytes().items() if key in theirs}
    own, other = ends
    if own is not None and other is not None and own not in pairs and other not in pairs.values():
        pairs[own] = other
    return sorted(pairs.items())


def _shown(piece: bytes) -> str:
    return repr(piece.decode(errors="backslashreplace"))


def _is_byte(name: str) -> bool:
    return len(name) == 6 and name.startswith("<0x") and name.endswith(">")


def _piece_bytes(name: str | None, steps: Sequence[Step]) -> bytes:
    piece: Piece = name or ""
    for step in steps:
        piece = step(piece)
    return piece.encode() if isinstance(piece, str) else piece


def _steps(decoder: Any) -> list[Step]:
    """What a tokenizer's decoder does with each token by itself."""
    told: dict[str, Any] = {"type": None} if decoder is None else json.loads(decoder.__getstate__())
    flat: list[dict[str, Any]] = told["decoders"] if told["type"] == "Sequence" else [told]
    for one in flat:
        if one["type"] not in _KINDS or (one["type"] == "Replace" and "String" not in one["pattern"]):
            raise DataError(
                f"the tokenizer joins its tokens by a decoder of type {one['type']}, so they are no pieces of the text "
                f"to compare by their bytes; known are {', '.join(_KINDS)}"
            )
    return [_KINDS[one["type"]](one) for one in flat]


def _byte_characters() -> dict[str, int]:
    """What byte-level tokenizers write for each byte: its own character where it can be seen, else one from 256 on."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


_BYTES = _byte_characters()


def _of_characters(piece: Piece) -> Piece:
    if isinstance(piece, str) and all(character in _BYTES for character in piece):
        return bytes(_BYTES[character] for character in piece)
    return piece


def _of_fallback(piece: Piece) -> Piece:
    return bytes([int(piece[3:5], 16)]) if isinstance(piece, str) and _is_byte(piece) else piece


def _replacing(old: str, new: str) -> Step:
    return lambda piece: piece.replace(old, new) if isinstance(piece, str) else piece


def _as_it_is(piece: Piece) -> Piece:
    return piece


_KINDS: Mapping[str, Callable[[Mapping[str, Any]], Step]] = {
    "ByteLevel": lambda _: _of_characters,
    "Metaspace": lambda told: _replacing(told["replacement"], " "),
    "Replace": lambda told: _replacing(told["pattern"]["String"], told["content"]),
    "ByteFallback": lambda _: _of_fallback,
    "Fuse": lambda _: _as_it_is,
    "Strip": lambda _: _as_it_is,  # of the whole text's beginning; see `TokenBytes.spans`
}
