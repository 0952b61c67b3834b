"""A remote store that fails: everything is repeated or reported, nothing fails silently, and no failure is taken
for an absence."""

import errno
import random
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from artifacts import Artifact, MissingError, Record, Store, StoreError, open_store, s3
from artifacts.materialize import problems_of
from artifacts.memory import locked_memory
from artifacts.remote import RemoteFiles
from artifacts.retry import Patience, call
from artifacts.s3 import READ_SECONDS, S3Files
from tests.campaigns.interposed import SHORT, STALE, Fault, Interposed, nth

FINGERPRINT = "ab" * 32
FILES = {"a": b"1" * 1000, "b": b"2"}
CALLS = ("cat_file", "pipe_file", "cp_file", "rm_file", "rm", "ls", "find", "info", "modified", "makedirs")


class Faulty:
    """A file system in memory whose call number `at` fails, once or from then on; `applied`: the call takes
    effect and only its answer is lost."""

    def __init__(self, at: int, error: BaseException, for_ever: bool, applied: bool) -> None:
        self.inner = locked_memory()
        self.at, self.error, self.for_ever, self.applied = at, error, for_ever, applied
        self.calls, self.lock = 0, threading.Lock()

    def __getattr__(self, name: str):
        method = getattr(self.inner, name)
        if name not in CALLS:
            return method

        def run(*arguments, **options):
            with self.lock:
                self.calls += 1
                fails = self.calls >= self.at if self.for_ever else self.calls == self.at
            if fails and self.applied:
                method(*arguments, **options)
            if fails:
                raise self.error
            return method(*arguments, **options)

        return run


class Clock:
    """Time that passes only by sleeping."""

    def __init__(self) -> None:
        self.now, self.pauses = 0.0, []

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.pauses.append(seconds)

    def patience(self) -> Patience:
        return Patience(deadline=60, sleep=self.sleep, clock=lambda: self.now)


def job(store: Store, folder) -> None:
    """What a stage does to a store."""
    assert store.lookup("sft", FINGERPRINT) is None
    artifact = store.put("model", folder, producer={})
    store.append_record(Record("sft", FINGERPRINT, outputs={"model": artifact}))
    store.checkpoints(FINGERPRINT).save(3, folder)
    assert store.checkpoints(FINGERPRINT).latest_step() == 3
    assert store.lookup("sft", FINGERPRINT) is not None
    store.materialize(artifact)


def runs(base, folder, error, for_ever=False, applied=False):
    """(outcome, healthy store over the same memory) of the job with each of its calls failing."""
    at = 1
    while True:
        root = f"/{base}-{type(error).__name__}-{for_ever}-{applied}-{at}"
        faulty, clock = Faulty(at, error, for_ever, applied), Clock()
        files = RemoteFiles(f"memory:/{root}", root, lambda faulty=faulty: faulty, clock.patience())
        try:
            job(Store(files, folder.parent / f"cache{root}"), folder)
            outcome = None
        except StoreError as caught:
            outcome = caught
        if faulty.calls < at:
            return
        yield outcome, open_store(f"memory:/{root}")
        at += 1


def sound(store: Store) -> bool:
    """All that is visible is right."""
    for artifact in store.artifacts():
        if problems_of(store.files, artifact.key, "files", store.manifest(artifact).files):
            return False
    return True


@pytest.mark.parametrize(
    ("error", "applied"),
    [(ConnectionResetError("gone"), False), (OSError(errno.EIO, "io"), False), (TimeoutError("slow"), True)],
    ids=["reset", "input/output", "answer lost"],
)
def test_what_fails_once_is_done_again(error, applied, fill, tmp_path):
    count = 0
    for outcome, store in runs(tmp_path.name, fill(FILES), error, applied=applied):
        count += 1
        assert outcome is None and sound(store) and store.lookup("sft", FINGERPRINT) is not None
    assert count > 20


@pytest.mark.parametrize("error", [PermissionError("403"), TimeoutError("slow")], ids=lambda e: type(e).__name__)
def test_what_fails_for_ever_is_reported_and_leaves_nothing_half_done(error, fill, tmp_path):
    count = 0
    for outcome, store in runs(tmp_path.name, fill(FILES), error, for_ever=True):
        count += 1
        assert isinstance(outcome, StoreError) and sound(store)
        message = str(outcome)
        assert "cannot" in message and tmp_path.name in message and str(error) in message and "attempt" in message
        assert store.checkpoints(FINGERPRINT).latest_step() in (None, 3)
    assert count > 20


def test_a_file_that_vanishes_after_it_was_taken_is_an_error(fill, tmp_path, monkeypatch):
    base, clock = f"/{tmp_path.name}", Clock()
    files = RemoteFiles(f"memory:/{base}", base, locked_memory, clock.patience())
    store, folder = Store(files, tmp_path / "cache"), fill(FILES)
    monkeypatch.setattr(RemoteFiles, "_send", lambda self, source, key, files: None)
    with pytest.raises(StoreError, match="and then it is not there"):
        store.put("model", folder, producer={})
    assert list(store.artifacts()) == []


def test_pauses_grow_to_a_limit_and_end_at_the_deadline():
    clock, patience = Clock(), Patience(deadline=60, first_pause=1, longest_pause=8)
    patience = Patience(60, 1, 8, clock.sleep, lambda: clock.now)

    def fail():
        raise TimeoutError("slow")

    users = random.getstate()
    with pytest.raises(StoreError, match=r"cannot read x after \d+ attempts in \d+ s: TimeoutError: slow; check"):
        call("read", "x", fail, patience)
    assert random.getstate() == users  # what users' code draws does not depend on the store
    for pause, limit in zip(clock.pauses, [1, 2, 4, 8, 8, 8], strict=False):
        assert limit / 2 <= pause <= limit
    assert 60 - 8 <= clock.now <= 60


@pytest.fixture
def answering(monkeypatch):
    """`answering(status)`: an S3 endpoint that answers everything with that status; counts its requests."""
    servers = []

    def start(status: int):
        requests = []

        class Handler(BaseHTTPRequestHandler):
            def answer(self):
                requests.append(self.path)
                self.rfile.read(int(self.headers.get("content-length") or 0))
                code = {403: "AccessDenied", 400: "InvalidRequest", 503: "ServiceUnavailable"}[status]
                body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = answer

            def log_message(self, *arguments):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "x")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        return requests

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("status", [403, 400])
def test_a_refusal_is_not_an_absence_and_not_repeated(status, answering, fill):
    requests = answering(status)
    clock = Clock()
    store = Store(S3Files("s3://bucket/x", patience=clock.patience()), fill({}))
    for ask in (
        lambda: store.lookup("sft", FINGERPRINT),
        lambda: store.put("model", fill(FILES), producer={}),
        lambda: store.checkpoints(FINGERPRINT).latest_step(),
        lambda: store.lease(FINGERPRINT, "me").acquire(),
        lambda: store.find("@name"),
        store.runs,
    ):
        before = len(requests)
        with pytest.raises(StoreError, match=f"HTTP {status}"):
            ask()
        assert len(requests) - before <= 4
    assert clock.pauses == []
    with pytest.raises(StoreError, match="cannot open store"):
        open_store("s3://bucket/x")


def test_a_busy_store_is_asked_again_until_the_deadline(answering, fill):
    requests = answering(503)
    clock = Clock()
    store = Store(S3Files("s3://bucket/x", patience=clock.patience()), fill({}))
    with pytest.raises(StoreError, match=r"after \d+ attempts.*HTTP 503"):
        store.lookup("sft", FINGERPRINT)
    assert len(requests) >= 8 and 45 <= clock.now <= 60


def test_a_missing_bucket_is_not_an_empty_store(s3_environment, s3_client, fill):
    with pytest.raises(StoreError, match="no bucket 'absent'"):
        open_store("s3://absent/x")
    # deleted while the pipeline runs: every record would look absent
    store = Store(S3Files("s3://absent/x", lambda: s3_client), fill({}))
    with pytest.raises(StoreError, match="the bucket does not exist"):
        store.lookup("sft", FINGERPRINT)


def test_a_store_that_is_not_there_is_reported_soon(monkeypatch, s3_environment):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{unused.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(StoreError, match=r"cannot open store s3://bucket/x.*AWS_ENDPOINT_URL"):
            open_store("s3://bucket/x", answer_seconds=2)
        assert time.monotonic() - start < READ_SECONDS


def test_a_store_that_says_nothing_is_reported_soon(monkeypatch, s3_environment):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(StoreError, match=r"no answer within 1 s"):
            open_store("s3://bucket/x", answer_seconds=1)
        assert time.monotonic() - start < READ_SECONDS


def test_what_takes_long_to_import_takes_nothing_of_the_time_to_answer(bucket, tmp_path, monkeypatch):
    library, places = s3.library, []
    monkeypatch.setattr(s3, "library", lambda: places.append(threading.current_thread().name) or library())
    open_store(f"{bucket}/{tmp_path.name}")
    assert places == [threading.current_thread().name]


@pytest.fixture
def failing(tmp_path, fill):
    """`failing(fault)`: an artifact in memory, and its store as one that has met the fault ever since."""

    def make(fault: Fault) -> tuple[Artifact, Store]:
        root, clock = f"/{tmp_path.name}", Clock()
        artifact = open_store(f"memory:/{root}").put("model", fill(FILES), producer={})
        fs = Interposed(locked_memory(), nth(1, fault, for_ever=True))
        return artifact, Store(RemoteFiles(f"memory:/{root}", root, lambda: fs, clock.patience()), tmp_path / "cache")

    return make


def test_renewing_sends_nothing_so_that_a_store_that_keeps_half_of_it_spoils_nothing(failing):
    artifact, store = failing(SHORT)
    before = store.files.tree(artifact.key)["manifest.json"].modified
    assert store.renew(artifact) and store.is_intact(artifact) and store.verify(artifact) == []
    assert store.files.tree(artifact.key)["manifest.json"].modified > before


def test_a_store_that_does_not_keep_what_it_took_is_given_up_in_words(failing, fill):
    artifact, store = failing(SHORT)
    with pytest.raises(StoreError, match=r"after \d+ attempts in \d+ s: .*took 6 bytes.*it has 3 bytes; .*--store"):
        store.put("model", fill({"a": b"123456"}), producer={})
    with pytest.raises(StoreError, match=r"cannot write .* attempts .* that are not those; .* other than it was given"):
        store.set_alias("team/model", artifact)
    assert sound(store) and list(store.artifacts()) == [artifact]


def test_a_shard_is_there_for_who_saved_it_though_no_list_has_it_yet(tmp_path):
    root = f"/{tmp_path.name}"
    fs = Interposed(locked_memory(), nth(1, STALE, for_ever=True))
    shards = Store(RemoteFiles(f"memory:/{root}", root, lambda: fs), tmp_path / "cache").shards(FINGERPRINT)
    shards.save("a", b"1")
    assert shards.load("a") == b"1"
    shards.clear()
    with pytest.raises(MissingError):
        shards.load("a")
