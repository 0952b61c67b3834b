"""Files to a repository of the Hugging Face Hub: in one commit, and looked at once they are there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from artifacts.digest import sha256_file
from artifacts.errors import StageError, UnreachableError

Kind = Literal["model", "dataset"]
Answer = TypeVar("Answer")

STALE = ("*.safetensors", "*.safetensors.index.json", "*.parquet")
"""What a repository had before is taken away where it is weights or rows, or old and new ones would mix."""


@dataclass(frozen=True)
class Repository:
    """Where to: `name` is owner/name."""

    name: str
    kind: Kind
    private: bool
    branch: str


def upload(to: Repository, files: Mapping[str, Path | bytes], message: str) -> tuple[str, str]:
    """(commit, its URL) of a commit in which the repository, made if there is none, has these files, by their paths.

    Raises StageError where the Hub refuses it, where the repository is public and ought to be private (or the other
    way), or where it has other content afterwards; UnreachableError where it does not answer.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    if get_token() is None:
        raise StageError(
            f"there is no token to write {to.kind} {to.name!r} of the Hub: set HF_TOKEN to one that may, or "
            "`hf auth login`"
        )
    of: dict[str, Any] = {"repo_id": to.name, "repo_type": to.kind}
    api = HfApi()
    _asked(to, lambda: api.create_repo(**of, private=to.private, exist_ok=True))
    info = _asked(to, lambda: api.repo_info(**of))
    if bool(info.private) != to.private:
        is_now, asked = "private" if info.private else "public", str(to.private).lower()
        raise StageError(
            f"{to.kind} {to.name!r} is {is_now} on the Hub, and private is {asked}: nothing was uploaded; change "
            "one of the two"
        )
    if to.branch != "main":
        _asked(to, lambda: api.create_branch(**of, branch=to.branch, exist_ok=True))
    there = _asked(to, lambda: api.list_repo_files(**of, revision=to.branch))
    gone = [CommitOperationDelete(path) for path in there if path not in files and _is_stale(path)]
    added = [
        CommitOperationAdd(path, content if isinstance(content, bytes) else str(content))
        for path, content in files.items()
    ]
    made = _asked(
        to, lambda: api.create_commit(**of, operations=[*added, *gone], commit_message=message, revision=to.branch)
    )
    _require_equal(to, _asked(to, lambda: api.repo_info(**of, revision=made.oid, files_metadata=True)), files)
    return str(made.oid), str(made.commit_url)


def _is_stale(path: str) -> bool:
    return any(Path(path).match(pattern) for pattern in STALE)


def _require_equal(to: Repository, info: Any, files: Mapping[str, Path | bytes]) -> None:
    """What the Hub says it has is what was sent, byte for byte by its hashes."""
    from huggingface_hub.utils.sha import git_hash

    found = {one.rfilename: one for one in info.siblings}
    for path, content in files.items():
        there = found.get(path)
        if there is not None and there.lfs is not None and isinstance(content, Path):
            same = there.lfs.sha256 == sha256_file(content)
        elif there is not None:
            same = there.blob_id == git_hash(content if isinstance(content, bytes) else content.read_bytes())
        else:
            same = False
        if not same:
            raise StageError(
                f"{to.kind} {to.name!r} of the Hub has {path} with other content than was sent, at commit {info.sha}; "
                "run the stage again"
            )


def _asked(to: Repository, ask: Callable[[], Answer]) -> Answer:
    """Its answer. Raises StageError or UnreachableError, in words, and without a token's characters."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    what, where = f"{to.kind} {to.name!r}", constants.ENDPOINT
    try:
        return ask()
    except OfflineModeIsEnabled:
        raise StageError(f"HF_HUB_OFFLINE forbids to write {what}; unset it") from None
    except UnicodeEncodeError:  # its message would quote the token
        raise StageError("HF_TOKEN holds characters that no token has; set it again") from None
    except HfHubHTTPError as error:
        code = error.response.status_code
        if code in (401, 403, 404):
            raise StageError(
                f"the Hub refuses to write {what} (HTTP {code}: {error.server_message}); set HF_TOKEN, or `hf auth "
                "login`, to a token of an account that may"
            ) from error
        if code < 500 and code != 429:
            raise StageError(f"the Hub refuses to write {what} (HTTP {code}): {error.server_message}") from error
        raise UnreachableError(f"the Hub at {where} does not take {what} at present (HTTP {code})") from error
    except ValueError as error:
        raise StageError(f"{what} cannot be written: {error}") from error
    except Exception as error:  # its HTTP client raises errors of its own, of another package in every version
        reason = type(error).__name__
        raise UnreachableError(
            f"the Hub at {where} does not answer for {what} ({reason}); check the network, and HF_ENDPOINT where it is "
            "set"
        ) from error
