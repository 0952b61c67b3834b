"""No power cut, at any step and whatever the disk had kept of what was not synced, leaves something that is seen
and wrong, or loses something that was acknowledged. In full: `python -m tests.campaigns power_loss`."""

import logging
import random

import pytest

from artifacts.files import Publication
from artifacts.local import LocalFiles
from tests.artifacts.snapshot import without
from tests.campaigns.operations import OPERATIONS, Operation
from tests.campaigns.power_loss import Recorded, campaign, recorded, wrongs

RENAMES_AND_TOUCHES = {"put what is there", "notice damage", "gc", "clear", "clear shards"}
"""Operations that write no content which must reach the disk."""


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def found(given: Recorded, samples: int = 20) -> tuple[int, list[str]]:
    """How many states there are, and what is wrong in them."""
    each = list(wrongs(given, samples, random.Random(1)))
    return len(each), [text for wrong in each for text in wrong]


@pytest.fixture(scope="module", params=OPERATIONS, ids=lambda operation: operation.name)
def protocol(request: pytest.FixtureRequest) -> tuple[Operation, Recorded]:
    return request.param, recorded([request.param])


def test_no_state_is_wrong_or_lost(protocol: tuple[Operation, Recorded]) -> None:
    count, wrong = found(protocol[1], samples=200)
    assert not wrong, (count, wrong[:5])
    assert count >= 20


@pytest.mark.parametrize("kind", ["fsync", "fsync_folder"])
def test_forgotten_syncs_are_found(protocol: tuple[Operation, Recorded], kind: str) -> None:
    operation, given = protocol
    _, wrong = found(Recorded(given.before, without(kind)(given.steps)))
    nothing_to_sync = operation.name == "put what is there" or (
        kind == "fsync" and operation.name in RENAMES_AND_TOUCHES
    )
    assert bool(wrong) != nothing_to_sync


class MarkerFirst(LocalFiles):
    """A protocol that announces files before they are there."""

    def publish(self, publication: Publication) -> None:
        self.write(f"{publication.key}/{publication.marker[0]}", publication.marker[1])
        super().publish(publication)


@pytest.mark.parametrize("name", ["put", "checkpoint"])
def test_a_marker_that_comes_first_is_found(name: str) -> None:
    [operation] = [operation for operation in OPERATIONS if operation.name == name]
    assert any("half there" in text for text in found(recorded([operation], MarkerFirst), samples=0)[1])


def test_operations_one_after_the_other() -> None:
    """Each of a hundred thousand states of single operations and pairs of them is looked at once."""
    outcome = campaign(100_000, seed=1, samples=12)
    assert outcome.anomalies == [] and outcome.counts["crash states"] == 100_000
    assert outcome.counts["protocols"] > 40
