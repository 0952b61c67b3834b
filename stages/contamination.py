"""Which evaluation rows the training data holds, word for word, nearly, or in part; and training data without them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from stages.stage import Config as StageConfig
from stages.stage import Input, Stage

if TYPE_CHECKING:
    from stages.context import Context


class Config(StageConfig):
    """Settings of the comparison."""

    columns: list[str] | None = None
    """Columns of text or messages to compare; null: those of text that both sides have (the prompt, most often), or all
    of a row's text where they have none in common."""
    similarity: float = Field(0.8, ge=0.3, le=1)
    """Rows are near duplicates from this Jaccard similarity of their sets of word runs on."""
    shingle_size: int = Field(5, ge=1)
    """Words of such a run."""
    ngram_size: int | None = Field(13, ge=2)
    """An evaluation row also counts as contaminated where a run of so many of its words stands in a training row (GPT-3
    took 13, arXiv:2005.14165); null: not looked at."""
    min_overlap: float = Field(0.0, ge=0, le=1)
    """Share of an evaluation row's runs that must stand in training rows; 0: one is enough."""
    within_train: bool = False
    """Look for near duplicates inside the training data too."""
    remove: bool = False
    """Give the training data without the rows found, as output `train`; of near duplicates, the first stays."""
    seed: int = 0
    """Seed of the hashes that near duplicates are found by."""


def run(context: Context) -> None:
    """Compare input `train` with input `evaluation`."""
    from stages.data.contaminating import compare

    compare(context)


STAGE = Stage(
    name="contamination",
    version=1,
    config=Config,
    inputs={"train": Input(("dataset",)), "evaluation": Input(("dataset",), many=True)},
    outputs={"contamination": "contamination", "train": "dataset"},
    active_outputs=lambda config: ("contamination", "train") if config.remove else ("contamination",),
    dataset_types=lambda config, inputs: {"train": inputs["train"]} if "train" in inputs else {},
    run=run,
    single=True,
    summary="Evaluation rows that stand in the training data: equal, nearly, or in part; removed if asked for",
    main_metric="contaminated_rate",
)
