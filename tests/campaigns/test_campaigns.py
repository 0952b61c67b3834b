"""A few of everything that the campaigns try: `python -m tests.campaigns --help`."""

import logging
from collections.abc import Iterator
from unittest import mock

import pytest

from artifacts.files import Publication
from artifacts.remote import RemoteFiles
from tests.campaigns import compound, corruption, disk_faults, interposed, mutants, simulation, storage_faults
from tests.campaigns.outcome import Outcome
from tests.campaigns.real_recipe import miniature
from tests.campaigns.small_recipe import installed


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


def test_faults_at_some_calls() -> None:
    outcome = storage_faults.campaign(50, seed=7, recipe_of=installed)
    assert outcome.anomalies == [] and outcome.counts["faulty runs"] > 80


def test_faults_at_some_calls_of_real_stages() -> None:
    outcome = Outcome(seed=0)
    with storage_faults.trials(miniature) as ((remote, _), (local, _)):
        storage_faults.systematic(remote, (interposed.RESET, interposed.SHORT), outcome, first=20, step=120)
        storage_faults.systematic(local, (disk_faults.NOT_SYNCED,), outcome, first=20, step=60)
    assert outcome.anomalies == [] and outcome.counts["faulty runs"] >= 10


def test_faults_at_random() -> None:
    outcome = storage_faults.random_campaign(20, seed=3, recipe_of=installed)
    assert outcome.anomalies == [] and outcome.counts["faults"] > 50


def test_two_troubles_in_a_row() -> None:
    outcome = compound.campaign(32, seed=2)
    assert outcome.anomalies == [] and outcome.counts["pairs of troubles"] == 32


def test_simulated_operations() -> None:
    outcome = simulation.campaign(1500, seed=4)
    assert outcome.anomalies == [] and outcome.counts["deaths"] > 10 and outcome.counts["surrenders"] > 5


def test_a_simulation_finds_a_manifest_that_comes_before_its_files() -> None:
    publish = RemoteFiles.publish

    def early(self: RemoteFiles, publication: Publication) -> None:
        self.write(f"{publication.key}/{publication.marker[0]}", publication.marker[1])
        publish(self, publication)

    with mock.patch.object(RemoteFiles, "publish", early):
        assert simulation.campaign(3000, seed=4).anomalies


def test_damage_of_every_kind() -> None:
    outcome = corruption.campaign(20, seed=2, step=25, reads=400)
    assert outcome.anomalies == [] and outcome.counts["bit flips"] >= 20 and outcome.counts["reruns"] > 5


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.name)
def test_planted_bugs_are_found(mutant: mutants.Mutant) -> None:
    with mutant.plant():
        assert mutants._found(mutant.hunt)


def test_an_outcome_in_one_line() -> None:
    outcome = Outcome(seed=3)
    outcome.counts["kills"] += 12_000
    assert outcome.line().startswith("12,000 kills, 0 anomalies, seed 3, commit ")
