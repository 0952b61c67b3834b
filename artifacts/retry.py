"""Calls to a remote store: what is repeated, for how long, and what is said when it is given up."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from artifacts.errors import StoreError, UnreachableError, causes
from artifacts.sealed import scrub

_CHANCE = random.SystemRandom()
"""Not the module's own generator: what users' code draws from it may not depend on how often the store was asked."""
R = TypeVar("R")
PASSING = (408, 409, 425, 429, 500, 502, 503, 504)
"""HTTP errors that a second try may not meet."""
TRANSPORTS = ("aiobotocore", "aiohttp", "botocore", "fsspec", "http", "urllib3")
"""Packages whose exceptions without an HTTP answer mean that something went wrong on the way."""


class WrongContentError(OSError):
    """The store acknowledges what it does not keep, or gives other bytes than it says it holds."""


@dataclass(frozen=True)
class Patience:
    """How long a call is repeated: pauses double from `first_pause` to `longest_pause` seconds, with jitter,
    until `deadline` seconds after the first try."""

    deadline: float = 120.0
    first_pause: float = 0.2
    longest_pause: float = 10.0
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic


def call(operation: str, target: str, function: Callable[[], R], patience: Patience) -> R:
    """`function()`, repeated while its failure may pass. FileNotFoundError and FileExistsError are answers
    and go through, unless it is the bucket that is missing; everything else becomes StoreError."""
    start, attempts, pause = patience.clock(), 0, patience.first_pause
    while True:
        attempts += 1
        try:
            return function()
        except StoreError:
            raise
        except (FileNotFoundError, FileExistsError) as error:
            if _error_code(error) == "NoSuchBucket":
                raise StoreError(f"cannot {operation} {target}: the bucket does not exist; create it") from None
            raise
        except Exception as error:
            elapsed = patience.clock() - start
            if not _may_pass(error) or elapsed + pause > patience.deadline:
                tries = f"{attempts} attempt{'s' if attempts > 1 else ''} in {elapsed:.0f} s"
                raise (UnreachableError if _may_pass(error) else StoreError)(
                    f"cannot {operation} {target} after {tries}: {_described(error)}; {_advice(error)}"
                ) from None
        patience.sleep(pause * _CHANCE.uniform(0.5, 1.0))
        pause = min(pause * 2, patience.longest_pause)


def status_of(error: BaseException) -> int | None:
    """The HTTP status behind an error, if there is one."""
    for link in causes(error):
        response = getattr(link, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            if isinstance(status, int):
                return status
        status = getattr(link, "status", None)
        if isinstance(status, int):
            return status
    return None


def _error_code(error: BaseException) -> str | None:
    for link in causes(error):
        response = getattr(link, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code"))
    return None


def _may_pass(error: Exception) -> bool:
    """Time-outs, broken connections, 5xx, 409 and 429."""
    status = status_of(error)
    if status is not None and status >= 300:
        return status in PASSING
    if isinstance(error, PermissionError):
        return False
    # botocore's NoCredentialsError, ParamValidationError and the like are about the request
    about_request = type(error).__name__.startswith(("NoCredentials", "PartialCredentials", "Param", "Invalid"))
    transport = type(error).__module__.split(".")[0] in TRANSPORTS
    return isinstance(error, OSError) or (transport and not about_request)


def _described(error: Exception) -> str:
    status = status_of(error)
    text = " ".join(scrub(str(error)).split())
    return f"{type(error).__name__}{f' (HTTP {status})' if status else ''}: {text[:300] or 'no message'}"


def _advice(error: Exception) -> str:
    status = status_of(error)
    if isinstance(error, PermissionError) or status in (401, 403) or "Credentials" in type(error).__name__:
        return (
            "check the credentials in the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, "
            "AWS_PROFILE) and that they may list, read, write and delete there"
        )
    if isinstance(error, WrongContentError):
        return (
            "it holds or gives other than it was given, and nothing of that is counted: run again, and should it "
            "happen twice choose another store (--store)"
        )
    if status == 400:
        return "check the bucket's name and region (AWS_DEFAULT_REGION)"
    return "check the network and the endpoint (AWS_ENDPOINT_URL), then run again: nothing done is lost"
