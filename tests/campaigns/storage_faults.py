"""A store that fails: call k of a miniature recipe of real stages, once and for ever, for every k and every kind of
fault, on a remote store and on a local disk; then one call in ten at random.

Nothing wrong and nothing partial is ever seen; what was acknowledged is not done again, unless that is said; where a
run gives up, it names operation, object, attempts and next step, and the next run ends with the right artifacts.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

from artifacts import Store
from artifacts.disk import UNSYNCED
from artifacts.manifest import library_versions
from artifacts.materialize import problems_of
from flows.recipe import Recipe
from tests.campaigns.disk_faults import DISK_FAULTS
from tests.campaigns.interposed import FAULTS, Decide, Fault, nth
from tests.campaigns.outcome import Outcome
from tests.campaigns.places import Local, Place, Remote
from tests.campaigns.real_recipe import miniature
from tests.campaigns.small_recipe import Attempt, attempt, installed

ERROR = re.compile(r"cannot [a-z ]+ (memory://|/)\S*.* after \d+ attempts?( in \d+ s)?: .+; .+")
"""What a surrender says: operation, object, attempts, cause, next step."""
SHARE = 0.1
"""Of the calls that fail at random."""
RecipeOf = Callable[[], contextlib.AbstractContextManager[Recipe]]


class Trial:
    """The recipe on a failing store, and on the same store when it is well again."""

    def __init__(self, recipe: Recipe, place: Place, expected: dict[str, str]) -> None:
        self.recipe, self.place, self.expected = recipe, place, expected
        self._done: Attempt | None = None

    def problems(self, decide: Decide, done_before: bool, passes: bool = False) -> list[str]:
        """What went wrong beyond the failure itself. `done_before`: the store holds it all already; `passes`: the
        fault does, so that the run must end well."""
        self.place.clear()
        before = self._all_done() if done_before else Attempt()
        with self.place.faulty(decide) as store:
            during = attempt(self.recipe, store)
        healthy = self.place.healthy()
        found = [f"gave up in other words: {error}" for error in during.errors if not ERROR.fullmatch(error)]
        if passes:
            found += [f"gave up for what passes: {error}" for error in during.errors]
        found += unsound(healthy)
        if during.well and during.outputs != self.expected:
            found.append(f"ended well with {during.outputs}")
        after = attempt(self.recipe, healthy)
        if not after.well or after.outputs != self.expected:
            found.append(f"the next run ended with {after.errors or after.outputs}")
        acknowledged = before.acknowledged
        for tried in (during, after):
            again = acknowledged & set(tried.worked_on)
            if again and not any("damaged" in warning for warning in tried.warnings):
                found += [f"silently done again: {fingerprint[:8]}" for fingerprint in again]
            acknowledged = acknowledged | tried.acknowledged
        return found

    def _all_done(self) -> Attempt:
        """Fills the store with all that the recipe makes."""
        if self._done is None:
            self._done = attempt(self.recipe, self.place.healthy())
            self.place.keep()
        else:
            self.place.bring_back()
        return self._done


def unsound(store: Store) -> list[str]:
    """What counts and is not right."""
    found = []
    for artifact in filter(store.is_intact, store.artifacts()):
        problems = problems_of(store.files, artifact.key, "files", store.manifest(artifact).files)
        found += [f"{artifact}: {problem}" for problem in problems]
    return found


def systematic(
    trial: Trial,
    faults: tuple[Fault, ...],
    outcome: Outcome,
    first: int = 1,
    step: int = 1,
    for_ever: tuple[bool, ...] = (False, True),
) -> None:
    """Every fault at every call that can fail so (from the one of number `first` on every `step`th), once and for
    ever, on an empty store and on one that holds everything."""
    for fault, lasting, done_before in itertools.product(faults, for_ever, (False, True)):
        for number in itertools.count(first, step):
            found = trial.problems(nth(number, fault, lasting), done_before, fault.passes and not lasting)
            if trial.place.met == 0:
                break  # there are not so many
            outcome.counts["faulty runs"] += 1
            where = f"{type(trial.place).__name__}, {fault} {'from' if lasting else 'at'} its call {number}"
            where += ", all done before" if done_before else ""
            outcome.anomalies += [f"{where}: {text}" for text in found]


def at_random(trial: Trial, seeds: range, faults: tuple[Fault, ...], outcome: Outcome) -> None:
    """One call in ten fails."""
    for seed in seeds:
        rng = random.Random(seed)

        def decide(number: int, name: str, rng: random.Random = rng) -> Fault | None:
            possible = [fault for fault in faults if name in fault.meets]
            return rng.choice(possible) if possible and rng.random() < SHARE else None

        found = trial.problems(decide, done_before=bool(seed % 2))
        outcome.counts["runs with faults at random"] += 1
        outcome.counts["faults"] += trial.place.met
        outcome.anomalies += [f"{type(trial.place).__name__}, seed {seed}: {text}" for text in found]


@contextlib.contextmanager
def trials(recipe_of: RecipeOf = installed) -> Iterator[list[tuple[Trial, tuple[Fault, ...]]]]:
    """A recipe on both kinds of store, with the faults that each may meet."""
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with (
        tempfile.TemporaryDirectory(dir=memory) as temporary,
        recipe_of() as recipe,
        mock.patch.dict(os.environ, {UNSYNCED: "1"}),
        mock.patch("artifacts.leases.is_dead", lambda tag: True),
        mock.patch("flows.run.require_shared"),  # here stages run in this process, where the memory is
    ):
        library_versions()
        found: list[tuple[Trial, tuple[Fault, ...]]] = []
        for place, faults in (
            (Remote(Path(temporary) / "remote"), FAULTS),
            (Local(Path(temporary) / "l"), DISK_FAULTS),
        ):
            clean = attempt(recipe, place.healthy())
            assert clean.well, clean.errors
            found.append((Trial(recipe, place, clean.outputs), faults))
        yield found


def campaign(count: int, seed: int, recipe_of: RecipeOf = miniature) -> Outcome:
    """Every fault at every call; with `count` > 1 only at every so manieth call, the first one by the seed."""
    outcome = Outcome(seed)
    with trials(recipe_of) as both:
        for trial, faults in both:
            systematic(trial, faults, outcome, first=1 + seed % count, step=count)
    return outcome


def random_campaign(count: int, seed: int, recipe_of: RecipeOf = miniature) -> Outcome:
    """So many runs with faults at random, three of four on the remote store."""
    outcome = Outcome(seed)
    with trials(recipe_of) as both:
        for number in range(seed * count, seed * count + count):
            trial, faults = both[number % 4 == 3]
            at_random(trial, range(number, number + 1), faults, outcome)
    return outcome
