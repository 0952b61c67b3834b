"""Several datasets as one: so much of each as its weight says, drawn by seed, its rows repeated where they are few."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from stages.stage import Config as StageConfig
from stages.stage import Input, Stage

if TYPE_CHECKING:
    from stages.context import Context

Weight = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Config(StageConfig):
    """Settings of a mixture."""

    weights: tuple[Weight, ...]
    """Share of the rows for each of the datasets, in their order; divided by their sum."""
    rows: Annotated[int, Field(ge=1)] | Literal["first_exhausted", "all_exhausted"] = "first_exhausted"
    """How many rows: a number; first_exhausted: as many as there are without repeating one; all_exhausted: as many as
    it takes to use every row of every dataset, smaller ones repeated."""
    names: tuple[str, ...] | None = None
    """A name for each dataset, for the column below and for `source_weights` of `sft`; null: no such column."""
    source_column: str = Field("source", min_length=1)
    """Column that says which dataset a row is from, where names are given."""
    seed: int = 0
    """Seed of the draws and of the order."""

    @model_validator(mode="after")
    def _a_name_each(self) -> Self:
        if self.names is not None and len(self.names) != len(self.weights):
            raise ValueError(f"{len(self.names)} names for {len(self.weights)} weights")
        if self.names is not None and len(set(self.names)) != len(self.names):
            raise ValueError("names must differ")
        if self.names is None and self.source_column != "source":
            raise ValueError("source_column is given, but names are not, so it would not be used")
        return self


def run(context: Context) -> None:
    """Mix input `datasets`."""
    from stages.data.mixing import mix

    mix(context)


STAGE = Stage(
    name="mixture",
    version=1,
    config=Config,
    inputs={"datasets": Input(("dataset",), many=True)},
    outputs={"dataset": "dataset"},
    dataset_types=lambda config, inputs: {"dataset": inputs["datasets"]} if "datasets" in inputs else {},
    run=run,
    single=True,
    summary="Several datasets as one, by weights: up- and down-sampled by seed, every row used equally often",
    main_metric="rows",
)
