"""Files to a repository of the Hugging Face Hub: in one commit, and looked at once they are there."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from artifacts.digest import sha256_file
from artifacts.errors import StageError, UnreachableError
from stages.hub_asking import Repository, asked
from stages.hub_card import README, card, is_generated
from stages.hub_parts import Content, Note, Part, contents, part_of_note, stale

TRIES = 5
"""Where others push to the same branch meanwhile."""
_PAUSE_SECONDS = 0.5


@dataclass(frozen=True)
class Uploaded:
    """A commit. `files`: path -> hash of what the Hub has, of all that was sent but the page."""

    commit: str
    url: str
    files: dict[str, str]
    page_is_ours: bool


class _Moved(Exception):
    """The branch is no longer what was listed."""


def upload(to: Repository, part: Part, page: bytes | None, message: str) -> Uploaded:
    """The commit in which the branch of the repository, both made if they are not there, has this part.

    `page`: the README.md to write, None: a generated one; one that a person wrote there stays.
    Raises StageError where the Hub refuses it, where the repository is public and ought to be private (or the other
    way), or where it has other content afterwards; UnreachableError where it does not answer.
    """
    api = _ready(to)
    for attempt in range(TRIES):
        head = _Head.read(api, to)
        sent, page_is_ours = head.with_notes(part, page)
        gone = stale(part.kind, part.name, sent, head.there, head.notes.get(part.name))
        try:
            made = asked(to, lambda: _commit(api, to, sent, gone, message, head.commit))  # noqa: B023
        except _Moved as error:
            said = str(error)
            time.sleep(_PAUSE_SECONDS * 2**attempt)
            continue
        info = asked(to, lambda: api.repo_info(**_of(to), revision=made.oid, files_metadata=True))  # noqa: B023
        # the client makes no commit where nothing differs, and then nobody held the branch to what was listed
        if _has(to, info, sent) and not stale(part.kind, part.name, sent, contents(info), None):
            kept = {path: content for path, content in contents(info).items() if path in sent and path != README}
            return Uploaded(str(made.oid), str(made.commit_url), kept, page_is_ours)
        said = "it changed while nothing was sent"
    raise UnreachableError(
        f"{to} of the Hub was changed by others in each of {TRIES} tries to write its branch {to.branch!r} ({said}); "
        "run the stage again when they are done; a token that may only open pull requests is answered so too"
    )


def missing(at: Repository, part: str, files: Mapping[str, str]) -> str | None:
    """Why a branch does not have these files (path -> hash) as its part and nothing that would mix with them; None: it
    has. Raises StageError or UnreachableError where the Hub does not tell."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    api = HfApi(endpoint=at.endpoint)
    where = f"branch {at.branch!r} of {at} at {at.endpoint}"
    try:
        info = asked(at, lambda: api.repo_info(**_of(at), revision=at.branch, files_metadata=True), "read")
    except StageError as error:
        if isinstance(error.__cause__, RepositoryNotFoundError | RevisionNotFoundError):
            return f"{where} is not there, or not for this token"
        raise
    there = contents(info)
    changed = [path for path, content in files.items() if there.get(path) != content]
    mixed = stale(at.kind, part, files, there, None)
    if not changed and not mixed:
        return None
    words = [f"other content or none in {', '.join(changed[:3])}"] if changed else []
    words += [f"{', '.join(mixed[:3])} beside it"] if mixed else []
    return f"{where} does not have what was pushed: {'; '.join(words)}"


def _of(to: Repository) -> dict[str, Any]:
    return {"repo_id": to.name, "repo_type": to.kind}


def _ready(to: Repository) -> Any:
    """The client, once repository and branch are there."""
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise StageError(
            f"there is no token to write {to} of the Hub: set HF_TOKEN to one that may, or `hf auth login`"
        )
    api = HfApi(endpoint=to.endpoint)
    asked(to, lambda: api.create_repo(**_of(to), private=to.private, exist_ok=True))
    info = asked(to, lambda: api.repo_info(**_of(to)))
    if bool(info.private) != to.private:
        is_now, wanted = "private" if info.private else "public", str(to.private).lower()
        raise StageError(
            f"{to} is {is_now} on the Hub, and private is {wanted}: nothing was uploaded; change one of the two"
        )
    if to.branch != "main":
        asked(to, lambda: api.create_branch(**_of(to), branch=to.branch, exist_ok=True))
    return api


@dataclass(frozen=True)
class _Head:
    """What the branch has. `notes`: of pushes before, by part."""

    repo: str
    commit: str
    there: dict[str, str]
    notes: dict[str, Note]
    page_is_generated: bool

    @classmethod
    def read(cls, api: Any, to: Repository) -> _Head:
        info = asked(to, lambda: api.repo_info(**_of(to), revision=to.branch, files_metadata=True))
        commit, there = str(info.sha), contents(info)
        parts = {part: path for path in there if (part := part_of_note(path)) is not None}
        notes = {
            part: Note.read(_fetched(api, to, path, commit), f"{path} of {to} of the Hub")
            for part, path in parts.items()
        }
        generated = README in there and is_generated(_fetched(api, to, README, commit))
        return cls(to.name, commit, there, notes, generated)

    def with_notes(self, part: Part, page: bytes | None) -> tuple[dict[str, Content], bool]:
        """The part's files with its note and, unless a person wrote the page that is there, a page; whether it is."""
        from huggingface_hub.utils.sha import git_hash

        others = {name: note.digest for name, note in self.notes.items() if name != part.name}
        content = page or card(self.repo, part, others)
        present, ours = self.there.get(README), {note.readme for note in self.notes.values()}
        written = present is None or present in ours or self.page_is_generated
        readme = git_hash(content) if written else None
        note = Note(part.digest, tuple(part.files), readme)
        sent = {**part.files, part.note_path: note.to_bytes()}
        return ({**sent, README: content} if written else sent), written


def _fetched(api: Any, to: Repository, path: str, commit: str) -> bytes:
    """A small file of the repository, kept in no cache."""
    with tempfile.TemporaryDirectory() as folder:
        found = asked(to, lambda: api.hf_hub_download(**_of(to), filename=path, revision=commit, local_dir=folder))
        return Path(found).read_bytes()


def _commit(api: Any, to: Repository, sent: Mapping[str, Content], gone: list[str], message: str, parent: str) -> Any:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.errors import HfHubHTTPError

    added = [
        CommitOperationAdd(path, content if isinstance(content, bytes) else str(content))
        for path, content in sent.items()
    ]
    operations = [*added, *(CommitOperationDelete(path) for path in gone)]
    try:
        return api.create_commit(
            **_of(to), operations=operations, commit_message=message, revision=to.branch, parent_commit=parent
        )
    except HfHubHTTPError as error:
        if (code := error.response.status_code) in (409, 412):
            raise _Moved(f"HTTP {code}: {error.server_message}") from None
        raise


def _has(to: Repository, info: Any, sent: Mapping[str, Content]) -> bool:
    """What the Hub says it has is what was sent, byte for byte by its hashes. Raises StageError where it is not."""
    from huggingface_hub.utils.sha import git_hash

    found = {one.rfilename: one for one in info.siblings}
    for path, content in sent.items():
        there = found.get(path)
        if there is not None and there.lfs is not None and isinstance(content, Path):
            same = there.lfs.sha256 == sha256_file(content)
        elif there is not None:
            same = there.blob_id == git_hash(content if isinstance(content, bytes) else content.read_bytes())
        else:
            same = False
        if not same:
            raise StageError(
                f"{to} of the Hub has {path} with other content than was sent, at commit {info.sha}; run the stage "
                "again"
            )
    return True
