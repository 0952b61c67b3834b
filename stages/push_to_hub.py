"""A model, adapter or dataset to the Hugging Face Hub, once for its content: a scheduled recipe uploads what is new."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field, field_validator

from stages.data.dataset import rows_files
from stages.hub_asking import Repository
from stages.hub_card import README, is_generated
from stages.hub_parts import MODEL, OURS, Content, Kind, Part, laid_out
from stages.hub_token import lacking_token
from stages.stage import MODELS, Input, Stage
from stages.stage import Config as StageConfig

if TYPE_CHECKING:
    from pathlib import Path

    from stages.context import Context

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_ADDRESS = re.compile(r"https?://[^/@?#\s]+(/[^@?#\s]*)?")
HUGGING_FACE = "https://huggingface.co"
RECORDS = ("metrics.jsonl", "steps.jsonl", "ledger.json", "samples.jsonl")
"""What artifacts have of how they were made; ledgers and samples quote rows."""


class Config(StageConfig):
    """Where to, and as what. The token is HF_TOKEN's or that of `hf auth login`."""

    repo: str = Field(max_length=96)
    """Repository `owner/name`, made if there is none."""
    endpoint: str | None = Field(None, min_length=1, validate_default=True)
    """Address of the Hub. null: HF_ENDPOINT's, or https://huggingface.co."""
    private: bool = True
    """Whether it is seen by its owner alone; one that is there already must be what this says."""
    branch: str = Field("main", min_length=1)
    """Its branch, made if there is none."""
    split: str | None = Field(None, pattern=r"^[A-Za-z][A-Za-z0-9_]*$", max_length=60)
    """Of a dataset: the split that the rows are, beside the repository's others. null: train."""
    commit_message: str | None = Field(None, min_length=1)
    """null: names the artifact."""
    records: bool = False
    """Upload what the artifact has of how it was made too: metrics, the row ledger, samples. The latter quote rows."""

    def lacks(self, environment: Mapping[str, str]) -> dict[str, str]:
        """A token: a run would find that out after all the training."""
        wrong = lacking_token(environment)
        return {} if wrong is None else {"repo": wrong}

    @field_validator("endpoint")
    @classmethod
    def _is_an_address(cls, value: str | None) -> str:
        """The environment's is written down: elsewhere the same stage would write to another Hub."""
        found = (value or os.environ.get("HF_ENDPOINT") or HUGGING_FACE).rstrip("/")
        if not _ADDRESS.fullmatch(found):
            shown, _, host = found.rpartition("@")
            raise ValueError(
                f"{'HF_ENDPOINT' if value is None else 'a Hub'} is http(s)://host, perhaps with a port or a path, "
                f"without a password; found {'***@' if shown else ''}{host!r}"
            )
        return found

    @field_validator("repo")
    @classmethod
    def _is_a_name(cls, value: str) -> str:
        refused = "--" in value or ".." in value or value.endswith(".git")
        if refused or not _NAME.fullmatch(value):
            raise ValueError(
                f"a Hub repository is owner/name, of letters, digits, '-', '_' and '.', without '--', '..' and a last "
                f"'.git'; found {value!r}"
            )
        return value


def check(config: Config, wired: frozenset[str]) -> list[str]:
    """What is wrong with configuration and inputs together."""
    given = {"model", "dataset"} & wired
    if len(given) != 1:
        found = "both" if given else "neither"
        return [f"takes one input, model (also an adapter or a reward model) or dataset; found {found}"]
    if config.split is not None and "model" in given:
        return [f"split is of datasets, and the input is a model; leave it out, found {config.split!r}"]
    return []


def writes(config: Config, wired: frozenset[str]) -> str:
    """What of the Hub it writes."""
    part = f", split {_part_name(config, 'dataset')}" if "dataset" in wired else ""
    kind = "dataset" if part else "model"
    return f"{kind} {config.repo!r} of {config.endpoint}, branch {config.branch!r}{part}"


def run(context: Context) -> None:
    """Upload the only input in one commit; output `commit` says which."""
    from stages.hub_upload import upload

    config: Config = context.config
    kind: Kind = "dataset" if context.has("dataset") else "model"
    folder = context.input(kind)
    _require_base_elsewhere(folder)
    part, page = _part(config, kind, folder, context.input_digest(kind))
    context.phase(f"uploading to {config.repo}")
    done = upload(_repository(config, kind), part, page, config.commit_message or f"posttrain {part.digest}")
    context.log(f"uploaded {len(part.files)} files: {done.url}")
    if not done.page_is_ours:
        context.log(f"{config.repo} has a README.md that somebody wrote or edited there: it stays as it is")
    context.counts["files"] = len(part.files)
    said = {
        "repo": config.repo,
        "kind": kind,
        "endpoint": config.endpoint,
        "branch": config.branch,
        "commit": done.commit,
        "url": done.url,
        "files": done.files,
    }
    (context.output("commit") / "commit.json").write_text(json.dumps(said, indent=1), encoding="utf-8")


def stands(config: Config, outputs: Mapping[str, Path]) -> str | None:
    """Why the branch does not have any more what a run put there; None: it has."""
    from stages.hub_upload import missing

    said = json.loads((outputs["commit"] / "commit.json").read_text(encoding="utf-8"))
    kind: Kind = said["kind"]
    return missing(_repository(config, kind), _part_name(config, kind), said["files"])


def _repository(config: Config, kind: Kind) -> Repository:
    assert config.endpoint is not None
    return Repository(config.repo, kind, config.private, config.branch, config.endpoint)


def _part_name(config: Config, kind: Kind) -> str:
    return MODEL if kind == "model" else config.split or "train"


def _part(config: Config, kind: Kind, folder: Path, digest: str) -> tuple[Part, bytes | None]:
    """What is uploaded, and the artifact's own page, if somebody wrote it one."""
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files: dict[str, Content] = {
        name: path
        for name, path in found.items()
        if name != README and not name.startswith(f"{OURS}/") and (config.records or path.name not in RECORDS)
    }
    rows = rows_files(folder) if kind == "dataset" else ()
    name = _part_name(config, kind)
    page = found[README].read_bytes() if README in found else None
    written = None if page is None or is_generated(page) else page
    return Part(kind, name, digest, laid_out(kind, name, files, rows)), written


def _require_base_elsewhere(folder: Path) -> None:
    from artifacts.errors import StageError
    from stages.adapters import CONFIG, Base, read_adapter_config

    if (path := folder / CONFIG).is_file():
        base = Base.read(read_adapter_config(path.read_bytes(), "the adapter"), "the adapter")
        if base.artifact is not None:
            raise StageError(
                f"the adapter is on {base}, which only this store has: nobody could load it; upload the model that "
                "stage merge_adapter makes of it"
            )


STAGE = Stage(
    name="push_to_hub",
    version=2,
    config=Config,
    inputs={
        "model": Input((*MODELS, "reward_model"), required=False),
        "dataset": Input(("dataset",), required=False),
    },
    outputs={"commit": "hub_commit"},
    run=run,
    check=check,
    writes=writes,
    stands=stands,
    single=True,
    summary="A model, adapter or dataset to the Hugging Face Hub, in one commit, once for its content",
)
