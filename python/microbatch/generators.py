"""The generators that data may draw from: Python's, NumPy's and torch's."""

import contextlib
import random
import struct
import sys
import zlib
from collections.abc import Iterator

import torch


def seed_all(*numbers: int) -> None:
    """Of the CPU. NumPy and torch's use 32 bits of a seed: the numbers are mixed into so many."""
    seed = zlib.crc32(struct.pack(f"<{len(numbers)}Q", *(one & 0xFFFF_FFFF_FFFF_FFFF for one in numbers)))
    random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed() takes a hundred times as long
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed)


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
