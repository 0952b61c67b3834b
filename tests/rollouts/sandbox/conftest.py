"""A sandbox as several users, and the world around it."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from stages.rollouts.sandbox.kernel import probe
from tests.rollouts.sandbox.users import MODES, NOBODY, Driver, copied_sandbox, python_for_all
from tests.rollouts.sandbox.world import CANARY, World


@pytest.fixture(scope="session")
def confining_kernel():
    """Without it no program is run."""
    if lacks := probe().missing():
        pytest.skip(f"no sandbox on this kernel: {'; '.join(lacks)}")


@pytest.fixture(scope="session")
def public_folder():
    """A folder that every user can reach, unlike pytest's."""
    folder = Path(tempfile.mkdtemp(prefix="posttrain-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def start_driver(public_folder, confining_kernel):
    """start_driver(mode's name, **settings) -> Driver; skips what this user cannot be."""
    python = None

    def start(name, **settings):
        nonlocal python
        mode = MODES[name]
        if os.getuid() != 0 and not mode.ordinary:
            pytest.skip("only root can be root")
        if python is None:
            python = python_for_all(public_folder), copied_sandbox(public_folder / "files")
        return Driver(*python, mode, CANARY, **settings)

    return start


@pytest.fixture(scope="module")
def start_world(public_folder):
    """start_world(mode's name) -> a new World for the user of that mode."""
    worlds = []

    def start(name):
        base = public_folder / f"{name}-{len(worlds)}"
        base.mkdir()
        base.chmod(0o755)
        worlds.append(World(base, NOBODY if MODES[name].ordinary and os.getuid() == 0 else os.getuid()))
        return worlds[-1]

    yield start
    for world in worlds:
        world.close()


@pytest.fixture(scope="module")
def place(start_driver, start_world):
    """place(mode's name) -> the driver of that mode and the world around it, the same ones every time."""
    places = {}

    def give(name):
        if name not in places:
            places[name] = start_driver(name), start_world(name)
            driver, world = places[name]
            world.targets["driver_pid"] = driver.process.pid
        return places[name]

    yield give
    for driver, _ in places.values():
        driver.close()
