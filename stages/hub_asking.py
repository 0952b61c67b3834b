"""Requests to a Hub that writes: what an error of the client means, in words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from artifacts.errors import StageError, UnreachableError, causes
from stages.hub import is_unanswered
from stages.hub_parts import Kind

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Repository:
    """Where to: `name` is owner/name, `endpoint` the Hub's address."""

    name: str
    kind: Kind
    private: bool
    branch: str
    endpoint: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r}"


def asked(to: Repository, ask: Callable[[], Answer], do: str = "write") -> Answer:
    """Its answer. Raises StageError where the Hub or its client refuses, UnreachableError where nobody answers, both
    without a token's characters; what else goes wrong is a mistake of ours and stays what it is."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return ask()
    except OfflineModeIsEnabled:
        raise StageError(f"HF_HUB_OFFLINE forbids to {do} {to}; unset it") from None
    except UnicodeEncodeError:  # its message would quote the token
        raise StageError("HF_TOKEN holds characters that no token has; set it again") from None
    except Exception as error:
        # of an upload the client says only that it failed, and the answer lies behind that
        for link in causes(error):
            if isinstance(link, HfHubHTTPError):
                raise _refused(to, link.response.status_code, str(link.server_message), do) from link
        if isinstance(error, ValueError):  # names, or the YAML of a page, that the client does not let through
            raise StageError(f"cannot {do} {to}: {error}") from error
        # hf_xet, through which large files go, has plain RuntimeErrors for what its servers do not take
        if not is_unanswered(error) and type(error) is not RuntimeError:
            raise
        reason = type(error).__name__
        raise UnreachableError(
            f"the Hub at {to.endpoint} does not answer for {to} ({reason}); check the network, and HF_ENDPOINT where "
            "it is set"
        ) from error


def _refused(to: Repository, code: int, said: str, do: str) -> StageError | UnreachableError:
    if code in (401, 403, 404):
        return StageError(
            f"the Hub refuses to {do} {to} (HTTP {code}: {said}); set HF_TOKEN, or `hf auth login`, to a token of an "
            "account that may"
        )
    if code < 500 and code != 429:
        return StageError(f"the Hub refuses to {do} {to} (HTTP {code}): {said}")
    return UnreachableError(f"the Hub at {to.endpoint} does not take {to} at present (HTTP {code})")
