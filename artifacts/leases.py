"""Leases: who works on a fingerprint. Advisory: they save work, correctness never depends on them.

A holder renews every sixth of the time to live and stops counting itself the holder at three quarters; others
take over after the whole of it and an allowance, or at once when the holder's process is known to be dead.
Ages are differences of the store's own times, waits are measured by clocks that no one sets.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any

from artifacts.digest import is_sha256
from artifacts.errors import DamagedError, RequestError
from artifacts.files import Files
from artifacts.owner import is_dead, owner_tag
from artifacts.sealed import seal, unseal

FIELDS: dict[str, type | tuple[type, ...]] = {
    "owner": str,
    "nonce": str,
    "number": int,
    "ttl_seconds": (int, float),
    "process": str,
    "free": bool,
}
LONGEST_TTL_SECONDS = 3600.0
"""Nobody asks for more, so a lease that says so is none."""
CLOCK_SECONDS = 60.0
"""By which the store's clock may have been set back since a lease was written; one of later binds nobody."""
HOLD_SHARE = 0.75
LARGEST_NUMBER = 2**53
ALLOWANCE_SHARE = 0.1
"""Of the time to live: what the taker waits longer, because stores round times to seconds."""


def _boot_clock() -> float:
    """Seconds that also pass while the machine sleeps, where the system can tell."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class Lease:
    """The lease of one fingerprint, as one owner sees it. `clock` counts seconds and never jumps."""

    def __init__(
        self,
        files: Files,
        fingerprint: str,
        owner: str,
        ttl_seconds: float = 60,
        clock: Callable[[], float] = _boot_clock,
    ) -> None:
        if not is_sha256(fingerprint) or not 0 < ttl_seconds <= LONGEST_TTL_SECONDS:
            raise RequestError(
                f"not a fingerprint (64 hex digits) or a ttl between 0 and {LONGEST_TTL_SECONDS:g} s: "
                f"{fingerprint!r}, {ttl_seconds}"
            )
        self._files = files
        self._key = f"work/{fingerprint}/lease.json"
        self._owner = owner
        self._ttl = ttl_seconds
        self._clock = clock
        self._nonce = os.urandom(8).hex()
        self._written: bytes | None = None
        self._confirmed = 0.0

    @property
    def held(self) -> bool:
        """Whether this owner may still go on as the holder, as far as it can know without asking."""
        return self._written is not None and self._clock() - self._confirmed < HOLD_SHARE * self._ttl

    @property
    def renew_every(self) -> float:
        """Seconds between renewals."""
        return self._ttl / 6

    def acquire(self) -> bool:
        """True: this owner holds the lease now. False: another one does; ask again later."""
        current = self._read()
        if current is not None and not self._may_take(current):
            return False
        number = 1 + (_number(current) if current is not None else 0)
        return self._write(current, number)

    def renew(self) -> bool:
        """Makes the lease young again. False: another one has taken it; its result will be as good."""
        if self._written is None:
            return False
        return self._write(self._written, _number(self._written))

    def release(self) -> None:
        """Gives the lease back; nothing happens if another one has it."""
        if self._written is not None:
            self._files.swap(self._key, self._written, self._body(_number(self._written), free=True))
            self._written = None

    def holder(self) -> dict[str, Any] | None:
        """`{"owner", "number", "ttl_seconds", "process", ...}` of whoever holds it now, or None."""
        current = self._read()
        if current is None or self._may_take(current, even_mine=False):
            return None
        return _parsed(current)

    def _may_take(self, current: bytes, even_mine: bool = True) -> bool:
        body = _parsed(current)
        if body is None or body["free"] or is_dead(body["process"]):
            return True
        if even_mine and body["nonce"] == self._nonce:
            return True
        age = self._files.age(self._key)
        return age is None or not -CLOCK_SECONDS <= age <= body["ttl_seconds"] * (1 + ALLOWANCE_SHARE)

    def _write(self, expected: bytes | None, number: int) -> bool:
        body, before = self._body(number), self._clock()
        if not self._files.swap(self._key, expected, body):
            self._written = None
            return False
        # a store that ignores conditions lets two writers through; the last one has it
        self._written = body if self._read() == body else None
        self._confirmed = before
        return self._written is not None

    def _read(self) -> bytes | None:
        try:
            return self._files.read(self._key)
        except FileNotFoundError:
            return None
        except DamagedError:
            return b""  # no file of ours: it binds nobody

    def _body(self, number: int, free: bool = False) -> bytes:
        return seal(
            {
                "owner": self._owner,
                "nonce": self._nonce,
                "number": number,
                "ttl_seconds": self._ttl,
                "process": owner_tag(),
                "free": free,
                # makes every renewal another content, so that compare-and-set sees it
                "written": os.urandom(8).hex(),
            }
        )


def _parsed(data: bytes) -> dict[str, Any] | None:
    """The body; None for a damaged lease, which binds nobody."""
    try:
        body = unseal(data, "lease")
    except DamagedError:
        return None
    if not all(isinstance(body.get(name), kind) for name, kind in FIELDS.items()):
        return None
    plausible = body["ttl_seconds"] <= LONGEST_TTL_SECONDS and 0 <= body["number"] < LARGEST_NUMBER
    return body if plausible else None


def _number(data: bytes) -> int:
    """The fencing number, also of a damaged lease if it can be read, so that numbers only grow."""
    try:
        number = json.loads(data)["number"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return 0
    return number if isinstance(number, int) and 0 <= number < LARGEST_NUMBER else 0
