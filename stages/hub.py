"""The Hugging Face Hub: which commit a name means, a repository's files, and what is said when it gives neither."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

from artifacts.errors import RequestError, StageError, causes
from stages.hub_cache import MAIN, cached_commit, cached_commits, note, remember

_HTTP_CLIENTS = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
"""What the client has asked the network through, in one version or another; each has errors of its own."""


def hub_revision(name: str, kind: str) -> str:
    """The commit of a Hub repository (`kind`: model or dataset) that its name means now.

    Where the Hub cannot be reached, the one that the local cache has for its main branch, which is said (`noted`).
    Raises RequestError.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        info = api.model_info(name) if kind == "model" else api.dataset_info(name)
        return str(info.sha)
    except Exception as error:  # its HTTP client raises errors of its own, of another package in every version
        if is_unanswered(error) and (commit := cached_commit(name, kind)) is not None:
            note(
                f"the Hub cannot be reached ({_reason(error)}): {kind} {name!r} is taken at commit {commit}, its main "
                "branch when the local cache last saw it"
            )
            return commit
        known = _known_commits(name, kind) if is_unanswered(error) else ""
        raise RequestError(_explained(error, f"{kind} {name!r}") + known) from _quotable(error)


def hub_folder(name: str, revision: str, branch: str | None = None) -> Path:
    """The folder with the files of a model of the Hub at a commit; what the local cache lacks is fetched. `branch`:
    the one that the commit was found at, to be found so again without the Hub. Raises StageError."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, revision=revision))
    except Exception as error:
        raise StageError(_explained(error, f"model {name!r} at commit {revision}")) from _quotable(error)
    if branch is not None:
        remember(name, "model", revision, branch)
    return folder


def is_unanswered(error: BaseException) -> bool:
    """Whether a request failed because nobody was reached, or nobody may be asked; not where a Hub answered."""
    from huggingface_hub.errors import HfHubHTTPError

    links = list(causes(error))
    return not any(isinstance(link, HfHubHTTPError) for link in links) and any(map(_is_of_network, links))


def _is_of_network(error: BaseException) -> bool:
    of_client = type(error).__module__.partition(".")[0] in _HTTP_CLIENTS
    return of_client or isinstance(error, ConnectionError | TimeoutError)


def _known_commits(name: str, kind: str) -> str:
    found = cached_commits(name, kind)
    if not found:
        return ""
    how = f"; name one: {name}@{found[0]}" if kind == "model" else ""
    return f". The cache has other commits, of which none is known to be its branch {MAIN}: {', '.join(found)}{how}"


def _explained(error: Exception, what: str) -> str:
    """What is wrong with a request for `what`, and what to do. The client often puts the reason behind an error that
    only says that there are no files."""
    known = _known_errors()
    for link in causes(error):
        for kind, words in known.items():
            if isinstance(link, kind):
                return words(what)
        if isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            return f"cannot keep {what} in {_cache()}: {link.strerror}; mend that, or set HF_HOME to another folder"
    return _unanswered(error, what)


def _known_errors() -> dict[type[Exception], Callable[[str], str]]:
    """An error of the client -> what is wrong and what to do, of classes and their subclasses the subclasses first."""
    from huggingface_hub import errors

    return {
        errors.GatedRepoError: lambda what: (
            f"{what} on the Hub is gated: accept its terms on its page, and set HF_TOKEN to a token of that account"
        ),
        errors.RepositoryNotFoundError: lambda what: f"no {what} on the Hub (a private one needs HF_TOKEN)",
        errors.RevisionNotFoundError: lambda what: (
            f"no {what} on the Hub; it may have been taken away: give another one, or none for the newest"
        ),
        errors.DisabledRepoError: lambda what: f"the Hub has disabled {what}; use another one, or give a folder",
        errors.OfflineModeIsEnabled: lambda what: (
            f"{what} is not in the local cache {_cache()}, and HF_HUB_OFFLINE forbids to ask the Hub; unset it, or "
            "give a folder"
        ),
        UnicodeEncodeError: lambda what: "HF_TOKEN holds characters that no token has; set it again, or unset it",
    }


def _unanswered(error: Exception, what: str) -> str:
    from huggingface_hub.errors import HfHubHTTPError

    answers = [link.response.status_code for link in causes(error) if isinstance(link, HfHubHTTPError)]
    if answers and answers[-1] in (401, 403):
        return f"the Hub refuses {what} (HTTP {answers[-1]}); set HF_TOKEN to a token of an account that may read it"
    if answers:
        return f"the Hub answers for {what} with HTTP {answers[-1]}; try again later, or give a folder"
    if not is_unanswered(error):
        return f"cannot get {what} of the Hub: {type(error).__name__}: {error}; give a folder, or tell us of it"
    return (
        f"the Hub does not answer for {what} and it is not in the local cache ({_reason(error)}); check the network or "
        "give a folder"
    )


def _reason(error: Exception) -> str:
    *_, last = causes(error)
    return type(last).__name__


def _cache() -> str:
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)


def _quotable(error: Exception) -> Exception | None:
    """The error, unless its message would quote the token."""
    return None if any(isinstance(link, UnicodeEncodeError) for link in causes(error)) else error
