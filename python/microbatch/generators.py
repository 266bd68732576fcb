"""The generators that data may draw from: Python's, NumPy's and torch's."""

import contextlib
import random
import sys
from collections.abc import Iterator

import torch


def seed_all(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed & 0x7FFF_FFFF_FFFF_FFFF)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed & 0xFFFF_FFFF)


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Their states after the body are those before it."""
    numpy = sys.modules.get("numpy")
    states = (random.getstate(), torch.get_rng_state(), None if numpy is None else numpy.random.get_state())
    try:
        yield
    finally:
        random.setstate(states[0])
        torch.set_rng_state(states[1])
        if numpy is not None:
            numpy.random.set_state(states[2])
