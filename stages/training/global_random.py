"""Random numbers of the libraries' own generators, which nothing of ours draws from, but other people's code may."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch


@contextmanager
def kept_random_numbers() -> Iterator[None]:
    """What draws after the block draws as if the block had not been."""
    python, legacy, torch_state = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    of_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        random.setstate(python)
        numpy.random.set_state(legacy)
        torch.set_rng_state(torch_state)
        if of_gpus:
            torch.cuda.set_rng_state_all(of_gpus)
