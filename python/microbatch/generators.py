"""The generators that data may draw from: Python's, NumPy's, and torch's of the CPU and of an accelerator."""

import contextlib
import random
import struct
import sys
import zlib
from collections.abc import Iterator
from typing import Any

import torch


def seed_all(*numbers: int) -> None:
    """NumPy and torch's use 32 bits of a seed: the numbers are mixed into so many."""
    seed = zlib.crc32(struct.pack(f"<{len(numbers)}Q", *(one & 0xFFFF_FFFF_FFFF_FFFF for one in numbers)))
    random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed() takes a hundred times as long
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed)
    if (accelerator := _accelerator()) is not None:
        accelerator.manual_seed_all(seed)


def _accelerator() -> Any:
    """The module of torch's accelerator, such as torch.cuda, if the process has used it; else None."""
    device = torch.accelerator.current_accelerator()
    if device is None:
        return None
    module: Any = torch.get_device_module(device)
    # A worker that was forked cannot use it.
    is_forked = getattr(module, "_is_in_bad_fork", lambda: False)()
    return module if not is_forked and getattr(module, "is_initialized", lambda: True)() else None


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Their states after the body are those before it."""
    numpy, accelerator = sys.modules.get("numpy"), _accelerator()
    states = (random.getstate(), torch.get_rng_state(), None if numpy is None else numpy.random.get_state())
    of_accelerator = None if accelerator is None else accelerator.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        torch.set_rng_state(states[1])
        if numpy is not None:
            numpy.random.set_state(states[2])
        if accelerator is not None:
            accelerator.set_rng_state(of_accelerator)
