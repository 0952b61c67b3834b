"""A model, adapter or dataset to the Hugging Face Hub, once for its content: a scheduled recipe uploads what is new."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from pydantic import Field, field_validator

from stages.stage import MODELS, Input, Stage
from stages.stage import Config as StageConfig

if TYPE_CHECKING:
    from pathlib import Path

    from stages.context import Context

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
RECORDS = ("metrics.jsonl", "steps.jsonl", "ledger.json", "samples.jsonl")
"""What artifacts have of how they were made; ledgers and samples quote rows."""


class Config(StageConfig):
    """Where to, and as what. The token is HF_TOKEN's or that of `hf auth login`."""

    repo: str = Field(max_length=96)
    """Repository `owner/name`, made if there is none."""
    private: bool = True
    """Whether it is seen by its owner alone; one that is there already must be what this says."""
    branch: str = Field("main", min_length=1)
    """Its branch, made if there is none."""
    commit_message: str | None = Field(None, min_length=1)
    """null: names the artifact."""
    records: bool = False
    """Upload what the artifact has of how it was made too: metrics, the row ledger, samples. The latter quote rows."""

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
    if len(given) == 1:
        return []
    found = "both" if given else "neither"
    return [f"takes one input, model (also an adapter or a reward model) or dataset; found {found}"]


def run(context: Context) -> None:
    """Upload the only input in one commit; output `commit` says which."""
    import json

    from stages.hub_upload import Repository, upload

    config: Config = context.config
    name = "dataset" if context.has("dataset") else "model"
    folder, digest = context.input(name), context.input_digest(name)
    files: dict[str, Path | bytes] = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and (config.records or path.name not in RECORDS)
    }
    _require_base_elsewhere(folder)
    if "README.md" not in files:
        files["README.md"] = _card(config.repo, name, digest, "adapter_config.json" in files).encode()
    context.phase(f"uploading to {config.repo}")
    to = Repository(config.repo, "dataset" if name == "dataset" else "model", config.private, config.branch)
    commit, url = upload(to, files, config.commit_message or f"posttrain {digest}")
    context.log(f"uploaded {len(files)} files: {url}")
    context.counts["files"] = len(files)
    said = {"repo": config.repo, "kind": to.kind, "commit": commit, "url": url, "files": sorted(files)}
    (context.output("commit") / "commit.json").write_text(json.dumps(said, indent=1), encoding="utf-8")


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


def _card(repo: str, kind: str, digest: str, is_adapter: bool) -> str:
    library = "" if kind == "dataset" else f"library_name: {'peft' if is_adapter else 'transformers'}\n"
    header = f"---\n{library}tags:\n- posttrain\n---\n"
    return f"{header}\n# {repo.partition('/')[2]}\n\nMade by posttrain: {kind} `{digest}`.\n"


STAGE = Stage(
    name="push_to_hub",
    version=1,
    config=Config,
    inputs={
        "model": Input((*MODELS, "reward_model"), required=False),
        "dataset": Input(("dataset",), required=False),
    },
    outputs={"commit": "hub_commit"},
    run=run,
    check=check,
    single=True,
    summary="A model, adapter or dataset to the Hugging Face Hub, in one commit, once for its content",
)
