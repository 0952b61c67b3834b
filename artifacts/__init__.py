"""What is kept: artifacts by content, the index by fingerprint, checkpoints, runs. No torch, no Prefect."""

from artifacts.checkpoints import Checkpoints
from artifacts.digest import FileEntry, canonical_json, digest_of, sha256_bytes, sha256_file
from artifacts.errors import (
    DamagedError,
    DataError,
    MissingError,
    PosttrainError,
    Problem,
    RequestError,
    StageError,
    StoreError,
)
from artifacts.folder import hash_folder
from artifacts.index import Record
from artifacts.leases import Lease
from artifacts.manifest import Artifact, Manifest
from artifacts.opening import default_cache, open_store, require_shared
from artifacts.sealed import scrub, seal, unseal
from artifacts.shards import Shards
from artifacts.store import Store

__all__ = [
    "Artifact",
    "Checkpoints",
    "DamagedError",
    "DataError",
    "FileEntry",
    "Lease",
    "Manifest",
    "MissingError",
    "PosttrainError",
    "Problem",
    "Record",
    "RequestError",
    "Shards",
    "StageError",
    "Store",
    "StoreError",
    "canonical_json",
    "default_cache",
    "digest_of",
    "hash_folder",
    "open_store",
    "require_shared",
    "scrub",
    "seal",
    "sha256_bytes",
    "sha256_file",
    "unseal",
]
