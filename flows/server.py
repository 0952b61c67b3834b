"""Which Prefect API a run reports to: the one the user has set up, or a temporary server of its own.

Imports no Prefect: the server starts while the flow process is still importing it.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from urllib.parse import urlsplit

from artifacts import default_cache
from artifacts.errors import RequestError, StageError
from flows import server_process
from flows.ports import listen

STARTUP_SECONDS = 240
"""A new database takes ten seconds to make, and many times that on a machine that is busy; a server that ended is
noticed at once."""
ANSWER_SECONDS = 60
"""As long as Prefect's own questions wait: on a machine that is busy a server is slow to say that it is well. One that
is not there refuses at once."""
ENDING_SECONDS = 20.0
"""It writes what it holds in one; one that is ended before has lost it."""
_HEALTH_BYTES = 1024

LOGS = 20
"""Of servers that ended badly."""
REPORTS = "reports"
"""In Prefect's home: the reports that `posttrain ui` gives out, <run>.html."""
QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}
"""No telemetry, neither from the server nor from the flow."""

_MEMORY = {"MALLOC_ARENA_MAX": "1"}
"""glibc gives threads heaps of their own, and each connection to the database is a thread: what is free in one of them
is no room for the others, and the server grows by 20 kB a run for hundreds of runs."""

_TEMPORARY = {
    "PREFECT_UI_ENABLED": "0",
    "PREFECT__SERVER_EPHEMERAL": "1",
    "PREFECT__SERVER_FINAL": "1",
    "PREFECT_SERVER_REGISTER_BLOCKS_ON_START": "false",
}


def configured_url() -> str | None:
    """The API that the user has set: in the environment, or in the active profile of Prefect's home."""
    if url := os.environ.get("PREFECT_API_URL"):
        return url
    theirs = Path(os.environ.get("PREFECT_HOME", "~/.prefect")).expanduser()
    path = Path(os.environ.get("PREFECT_PROFILES_PATH", theirs / "profiles.toml"))
    with contextlib.suppress(OSError, tomllib.TOMLDecodeError):
        profiles = tomllib.loads(path.read_text(encoding="utf-8"))
        active = os.environ.get("PREFECT_PROFILE", profiles.get("active"))
        url = profiles.get("profiles", {}).get(active, {}).get("PREFECT_API_URL")
        return str(url) if url else None
    return None


def prefect_home() -> Path:
    """Where the database of our own servers is, temporary ones and that of `posttrain ui`."""
    return Path(os.environ.get("PREFECT_HOME") or default_cache() / "prefect").expanduser().absolute()


def require_answer(url: str) -> None:
    """Raises RequestError when nothing, or something else than Prefect, answers at the API's address."""
    is_cloud = (urlsplit(url).hostname or "").endswith(".prefect.cloud")  # what it says there is not known
    try:
        with _opener(url).open(f"{url.rstrip('/')}/health", timeout=ANSWER_SECONDS) as answer:
            said = answer.read(_HEALTH_BYTES).strip()
        if said != b"true" and not is_cloud:
            raise _not_prefect(url, f"/health says {said[:40]!r} instead of true")
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == HTTPStatus.NOT_FOUND and not is_cloud:
            raise _not_prefect(url, "it has no /health") from error
        # whether it lets us in, Prefect says better
    except http.client.HTTPException as error:
        raise _not_prefect(url, f"no HTTP: {type(error).__name__}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise RequestError(
            f"Prefect's API at {url} does not answer ({reason}); start it (`prefect server start`), correct "
            "PREFECT_API_URL, or unset it: a run then brings a temporary server of its own"
        ) from error


def _not_prefect(url: str, found: str) -> RequestError:
    return RequestError(
        f"what answers at {url} is not Prefect's API ({found}); the port may be another program's. Correct "
        "PREFECT_API_URL (it ends with /api), or unset it: a run then brings a temporary server of its own"
    )


class ServerProcess:
    """A Prefect server on a loopback port with its database in `home`; it ends with this process.

    `reports`: a folder of pages that it gives out as well. Raises RequestError for a port that is taken.
    """

    def __init__(self, home: Path, settings: Mapping[str, str], *, port: int = 0, reports: Path | None = None) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self._log = home / f"server-{os.getpid()}.log"
        clear_logs(home)
        with listen(port) as listener:
            self.address = f"http://127.0.0.1:{listener.getsockname()[1]}"
            self.url = f"{self.address}/api"
            # the pages ask at port 4200 unless they are told another address, and what Prefect sends has no links
            own = {"PREFECT_HOME": str(home), "PREFECT_UI_API_URL": self.url, "PREFECT_UI_URL": self.address}
            descriptor = str(listener.fileno())
            with open(self._log, "wb") as log:
                self._process = subprocess.Popen(
                    # -P: the folder of this package must not shadow the standard library
                    [
                        sys.executable,
                        "-P",
                        server_process.__file__,
                        descriptor,
                        *([] if reports is None else [str(reports)]),
                    ],
                    env={**_MEMORY, **os.environ, **QUIET, **settings, **own},
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    pass_fds=(listener.fileno(),),
                    start_new_session=True,  # Ctrl-C is for the flow, which still has to report its end
                )

    def wait(self) -> str:
        """The address of the API once it answers. Raises StageError with the reason when it cannot start."""
        deadline = time.monotonic() + STARTUP_SECONDS
        while time.monotonic() < deadline and not self.ended():
            try:
                with _opener(self.url).open(f"{self.url}/health", timeout=deadline - time.monotonic()):
                    return self.url
            except urllib.error.HTTPError as error:
                error.close()  # it is still starting
            except OSError:
                pass  # it ended
            time.sleep(0.05)
        problem = "ended" if self.ended() else f"did not answer in {STARTUP_SECONDS} s"
        self.close()
        raise StageError(
            f"Prefect's server {problem}: {self.last_line()} (log: {self._log}); its database is in "
            f"{self._log.parent}; set PREFECT_API_URL to use a server of your own"
        )

    def ended(self) -> bool:
        """Whether its process is gone."""
        return self._process.poll() is not None

    def last_line(self) -> str:
        """The last that it said."""
        return (self._log.read_text(errors="replace").strip().splitlines() or ["it printed nothing"])[-1]

    def close(self, *, soon: bool = False) -> None:
        """End it and wait for that. Unless it has to be `soon`, it first writes what it still holds."""
        stdin = self._process.stdin
        assert stdin is not None
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):  # it has ended, or takes too long
            if not soon:
                stdin.write(b"\n")
                stdin.flush()
                self._process.wait(ENDING_SECONDS)
        with contextlib.suppress(OSError):
            stdin.close()
        try:
            self._process.wait(server_process.GRACE_SECONDS + 1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(soon=error is not None)
        if error is None:
            self._log.unlink(missing_ok=True)


def clear_logs(home: Path, most: int = LOGS) -> None:
    """A server whose run failed leaves its log: of those the newest stay, and those of runs that go on."""
    with contextlib.suppress(FileNotFoundError):  # another one clears them away
        logs = sorted(home.glob("server-*.log"), key=lambda log: log.stat().st_mtime, reverse=True)
        for log in logs[most:]:
            if not _lives(log.stem.removeprefix("server-")):
                log.unlink()


def _lives(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except PermissionError:
        return True
    except (OSError, ValueError, OverflowError):
        return False
    return True


def temporary_server(home: Path) -> ServerProcess:
    """A server on a free port for one run: no pages, no services."""
    return ServerProcess(home, _TEMPORARY)


@contextlib.contextmanager
def loopback_without_proxy() -> Iterator[None]:
    """Keep a proxy that the environment names away from the temporary server."""
    before = {name: os.environ.get(name) for name in ("no_proxy", "NO_PROXY")}
    given = before["no_proxy"] or before["NO_PROXY"]
    for name in before:
        os.environ[name] = f"{given},127.0.0.1" if given else "127.0.0.1"
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _opener(url: str) -> urllib.request.OpenerDirector:
    if urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1"):
        return urllib.request.build_opener(urllib.request.ProxyHandler({}))
    return urllib.request.build_opener()
