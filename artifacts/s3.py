"""A store's files on S3 and what speaks its protocol. Credentials, region and endpoint come from the
environment (AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_ENDPOINT_URL, ...) and nowhere else."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import Any

from artifacts.errors import RequestError, StoreError
from artifacts.files import Stored
from artifacts.remote import THREADS, RemoteFiles
from artifacts.retry import Patience, status_of

CONNECT_SECONDS = 4
READ_SECONDS = 60
PART = 32 * 2**20
PARTS_AT_ONCE = 8
LOST_RACE = (409, 412)
AMAZON = re.compile(r"\.amazonaws\.com(\.cn)?(:\d+)?/?$")
"""There a bucket's name is one bucket's, whatever the region."""
NO_SUCH_RANGE = 416
"""What the first bytes of an empty object are answered with."""


class S3Files(RemoteFiles):
    """RemoteFiles with what only S3 has: compare-and-set by ETag, and the server's own clock."""

    def __init__(self, url: str, make: Callable[[], Any] | None = None, patience: Patience | None = None) -> None:
        super().__init__(url, url.removeprefix("s3://").strip("/"), make or _file_system, patience)
        self._bucket, _, self._prefix = self._base.partition("/")
        if not self._bucket:
            raise RequestError(f"{url!r} names no bucket; write s3://bucket/folder")

    @property
    def place(self) -> str:
        server = str(self.fs.s3.meta.endpoint_url)
        return self.url if AMAZON.search(server) else f"{self.url} at {server}"

    def _check_empty_root(self) -> None:
        try:
            self.fs.info(self._bucket)
        except FileNotFoundError:
            raise StoreError(f"cannot open store {self.url}: there is no bucket {self._bucket!r}; create it") from None

    def _first(self, key: str, count: int) -> bytes:
        try:
            return super()._first(key, count)
        except Exception as error:
            if status_of(error) == NO_SUCH_RANGE:
                return b""
            raise

    def swap(self, key: str, expected: bytes | None, data: bytes) -> bool:
        try:
            if expected is None:
                self._call("create", key, partial(self._conditionally, key, data, IfNoneMatch="*"))
                return True
            tag = self._call("read", key, lambda: self.fs.info(self.path(key)))["ETag"]
            if self.read(key) != expected:
                return False
            self._call("replace", key, partial(self._conditionally, key, data, IfMatch=tag))
        except (_LostRace, FileNotFoundError, FileExistsError):
            # the answer to an earlier try may have been lost on the way: ours may be there
            return self._holds(key, data)
        return True

    def _holds(self, key: str, data: bytes) -> bool:
        try:
            return self.read(key) == data
        except FileNotFoundError:
            return False

    def _conditionally(self, key: str, data: bytes, **condition: str) -> None:
        try:
            self.fs.pipe_file(self.path(key), data, **condition)
        except Exception as error:
            if status_of(error) in LOST_RACE:
                raise _LostRace(f"{self.url}/{key} was written by another") from None
            raise

    def age(self, key: str) -> float | None:
        def seconds() -> float:
            answer = self.fs.call_s3("head_object", Bucket=self._bucket, Key=self._name(key))
            now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
            return float((now - answer["LastModified"]).total_seconds())

        try:
            return self._call("read the time of", key, seconds)
        except FileNotFoundError:
            return None

    def now(self) -> float:
        def seconds() -> float:
            answer = self.fs.call_s3("head_bucket", Bucket=self._bucket)
            return parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"]).timestamp()

        return self._call("read the time of", "", seconds)

    def touch(self, key: str) -> None:
        """The server copies the object onto itself: one that is gone does not come back."""
        source = {"Bucket": self._bucket, "Key": self._name(key)}
        copy = partial(self.fs.call_s3, "copy_object", CopySource=source, MetadataDirective="REPLACE", **source)
        self._call("touch", key, copy)

    def unfinished(self) -> dict[str, Stored]:
        """Uploads in parts that were neither completed nor given up; they cost money and are in no listing."""
        prefix = f"{self._prefix}/" if self._prefix else ""
        found: dict[str, Stored] = {}
        marker: dict[str, str] = {}
        while True:
            ask = partial(self.fs.call_s3, "list_multipart_uploads", Bucket=self._bucket, Prefix=prefix, **marker)
            answer = self._call("list unfinished uploads of", "", ask)
            for upload in answer.get("Uploads") or ():
                name = f"{upload['Key'].removeprefix(prefix)}?{upload['UploadId']}"
                found[name] = Stored(0, upload["Initiated"].timestamp())
            if not answer.get("IsTruncated"):
                return found
            marker = {"KeyMarker": answer["NextKeyMarker"], "UploadIdMarker": answer["NextUploadIdMarker"]}

    def abandon(self, name: str) -> None:
        key, _, upload = name.rpartition("?")
        request = {"Bucket": self._bucket, "Key": self._name(key), "UploadId": upload}
        with contextlib.suppress(FileNotFoundError):
            self._call("give up the upload of", key, partial(self.fs.call_s3, "abort_multipart_upload", **request))

    def _name(self, key: str) -> str:
        return f"{self._prefix}/{key}".strip("/")

    def _make_parent(self, key: str) -> None:
        """S3 has no folders, and s3fs would create a missing bucket."""

    def _send(self, source: Path, key: str, files: int) -> None:
        # parts of 32 MiB: at most 256 MiB in memory, whether of one large file or of several at once
        at_once = PARTS_AT_ONCE // min(THREADS, files)
        self.fs.put_file(str(source), self.path(key), chunksize=PART, max_concurrency=at_once)

    def _drop_folder(self, key: str) -> None:
        """S3 has no folders."""


class _LostRace(StoreError):
    """A conditional write was refused, because another writer came first."""


def library() -> Any:
    """s3fs. To import it takes seconds, on a machine that is busy many."""
    try:
        import s3fs
    except ImportError:
        raise RequestError("a store on S3 needs the package s3fs: pip install 'posttrain[s3]'") from None
    return s3fs


def _file_system() -> Any:
    fs = library().S3FileSystem(
        skip_instance_cache=True,
        use_listings_cache=False,
        default_cache_type="none",
        config_kwargs={
            "connect_timeout": CONNECT_SECONDS,
            "read_timeout": READ_SECONDS,
            "retries": {"total_max_attempts": 1},
            "max_pool_connections": 4 * THREADS,
        },
    )
    # artifacts.retry repeats, with a deadline and the reason; two layers of repetition would multiply
    fs.retries = 1
    return fs
