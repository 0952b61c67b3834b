"""From whatever rows there are to a typed dataset with row ids, a ledger, and a held-out split if asked for."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from stages.data.columns import template_fields
from stages.data.types import DatasetType
from stages.stage import Arguments, CodeRef, Config, DataRef, Stage

if TYPE_CHECKING:
    from stages.context import Context

_CREDENTIALS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.:-]*://[^/]*@")


class SourceConfig(Config):
    """Where the rows come from."""

    path: DataRef | None = None
    """A file, a folder, a glob, any fsspec URL, or `hub:owner/name`. `.gz` and `.zst` are unpacked."""
    function: CodeRef | None = None
    """Without `path`: a function that yields rows (dicts). With it: called with each row read; gives a row, a list
    of rows, or None to leave it out."""
    arguments: Arguments = Field(default={})
    """Keyword arguments of the function. Files and folders that they name count by content, relative ones from the
    recipe; so the function is only to read them."""
    format: Literal["auto", "jsonl", "json", "csv", "parquet", "arrow", "saved"] = "auto"
    """auto: by extension; `saved` is a folder of `datasets.save_to_disk`."""
    subset: str | None = None
    """Configuration name of a Hub dataset."""
    split: str | None = None
    """Split of a Hub or saved dataset that has several."""

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if self.path is None and self.function is None:
            raise ValueError("give path (a file, folder, URL or hub:owner/name) or function (file.py:rows)")
        if self.arguments and self.function is None:
            raise ValueError("arguments without function")
        if self.path is not None and _CREDENTIALS.match(self.path):
            raise ValueError(
                "a URL with a user or password: recipes and what they leave are read by many; credentials come from "
                "the environment"
            )
        return self


class TemplateMessage(Config):
    """One message of a conversational template."""

    role: Literal["system", "user", "assistant"]
    content: str
    """Text with {field}s."""


class Filters(Config):
    """Which rows to leave out; each reason is counted."""

    min_characters: int | None = Field(default=None, ge=1)
    """Characters over all text of the row, at least."""
    max_characters: int | None = Field(default=None, ge=1)
    """Characters over all text of the row, at most."""
    keep: CodeRef | None = None
    """A function of the typed row that is true for rows to keep."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        low, high = self.min_characters, self.max_characters
        if low is not None and high is not None and low > high:
            raise ValueError(f"min_characters {low} is above max_characters {high}, which leaves no row; exchange them")
        return self


class NormalizeConfig(Config):
    """Settings of `normalize`."""

    source: SourceConfig
    """Where the rows come from."""
    type: DatasetType | Literal["auto"] = "auto"
    """Dataset type to make; auto: by the columns of the first row."""
    columns: dict[str, str] = Field(default={})
    """Our column -> theirs (`a.b` reaches into objects)."""
    templates: dict[str, str | list[TemplateMessage]] = Field(default={})
    """Column -> text with {field}s of the source row, or a list of {role, content} with such contents."""
    keep_columns: list[str] | None = None
    """Columns to keep beside those of the type and those made by columns and templates; null: all."""
    system: str | None = None
    """System message put before conversations that have none."""
    chat_template_kwargs: dict[str, Any] = Field(default={})
    """Arguments of the chat template (`{enable_thinking: false}`) for conversations that give none of that name."""
    deduplicate: bool | list[str] = True
    """Drop rows that equal an earlier one: in every column, or in the columns named."""
    filters: Filters = Filters()
    """Rows to leave out."""
    on_bad_row: Literal["fail", "drop"] = "fail"
    """What a row does that cannot be converted, or a line of JSON lines that is none: stop the stage, or be dropped and
    counted by what is wrong with which column. (An empty line is no row.)"""
    limit: int | None = Field(default=None, ge=1)
    """Keep so many rows, drawn by seed and content."""
    test_size: int | float | None = Field(default=None, gt=0)
    """Rows (or the fraction of rows, below 1) held out as output `test`."""
    group_by: str | None = None
    """Column whose equal values stay on one side of the split."""
    seed: int = 0
    """Seed of limit and split."""

    @field_validator("test_size")
    @classmethod
    def _rows_or_fraction(cls, value: int | float | None) -> int | float | None:
        if isinstance(value, float) and value >= 1:
            raise ValueError(f"expected a fraction below 1 or a whole number of rows, found {value}")
        return value

    @field_validator("templates")
    @classmethod
    def _well_formed(cls, value: dict[str, Any]) -> dict[str, Any]:
        for template in value.values():
            for text in [template] if isinstance(template, str) else [turn.content for turn in template]:
                template_fields(text)
        return value

    @model_validator(mode="after")
    def _columns_once(self) -> Self:
        double = sorted(set(self.columns) & set(self.templates))
        if double:
            raise ValueError(f"{', '.join(double)}: both in columns and in templates")
        if self.limit is not None and isinstance(self.test_size, int) and self.test_size >= self.limit:
            raise ValueError(
                f"limit {self.limit} leaves no row to train on beside test_size {self.test_size}; raise limit or lower "
                "test_size"
            )
        if self.group_by is not None and self.test_size is None:
            raise ValueError(
                "group_by says how test_size splits, and there is none; give test_size or take group_by out"
            )
        return self


def run(context: Context) -> None:
    """Reads, converts, filters and splits; memory holds digests of the rows, never all of the rows."""
    from stages.data.normalizing import normalize

    normalize(context)


STAGE = Stage(
    name="normalize",
    version=4,
    config=NormalizeConfig,
    inputs={},
    outputs={"train": "dataset", "test": "dataset"},
    active_outputs=lambda config: ("train", "test") if config.test_size is not None else ("train",),
    dataset_types=lambda config, inputs: {} if config.type == "auto" else {"train": config.type, "test": config.type},
    run=run,
    single=True,
    summary="Any source of rows to a typed dataset: columns, templates, filters, deduplication, split",
    main_metric="rows",
)
