"""Memory of a device's tensors: what is live, the peak, and a budget that is enforced.

On the CPU, which is meant if no device is named, counting begins with the first Accumulator or budget of the process;
tensors made before are not counted, except the parameters of a model that an Accumulator takes over. On other devices
their own allocator counts, and takes the budget as its limit where it has one (CUDA). Sizes are bytes, or text such as
"4GiB".

    with mb.memory.budget("512MiB"):
        accumulator.step(batch)
    print(mb.memory.format_size(mb.memory.peak()), mb.memory.stats())
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator

import torch

from microbatch import _core
from microbatch.errors import UsageError

__all__ = ["Stats", "available", "budget", "format_size", "install", "parse_size", "peak", "reset_peak", "set_budget", "stats"]


Device = torch.device | str


@dataclasses.dataclass(frozen=True)
class Stats:
    """Bytes of this process's tensors on a device; zeros before counting begins."""

    live_bytes: int
    peak_bytes: int  #: the most that was live since reset_peak()
    cached_bytes: int  #: freed blocks kept for reuse, not in live_bytes
    budget_bytes: int | None  #: None: no budget
    #: the most that a device's allocator had taken from it, with what lies between tensors; 0 on the CPU
    peak_reserved_bytes: int = 0


def parse_size(size: int | str) -> int:
    """Bytes of a size: 4096, "512MiB", "1.5 GiB", "2GB". Raises UsageError for anything else, or less than 1."""
    if isinstance(size, bool) or not isinstance(size, int | str):
        raise UsageError(f"a size is a number of bytes or text such as '4GiB', not {size!r}")
    return _core.parse_bytes(str(size))


def format_size(size: int) -> str:
    """A size for people: 2415919104 as "2.25 GiB"."""
    return _core.format_bytes(size)


def install() -> None:
    """Counts every CPU tensor from now on; a second call does nothing."""
    _core.install()


def stats(device: Device = "cpu") -> Stats:
    live, peak_bytes, cached, peak_reserved = _core.memory_use(torch.device(device))
    limit = _core.budget(torch.device(device))
    return Stats(live, peak_bytes, cached, None if limit == _core.no_budget else limit, peak_reserved)


def peak(device: Device = "cpu") -> int:
    """The most bytes that were live at once since reset_peak()."""
    return stats(device).peak_bytes


def reset_peak(device: Device = "cpu") -> None:
    """Lets the peak begin again at what is live now."""
    _core.reset_peak(torch.device(device))


def available(device: Device = "cpu") -> int:
    """Bytes that this process can still take.

    On the CPU: what the system has, or what is left of the container's limit. On another device: what is free, and what
    its allocator keeps.
    """
    return _core.available_memory(torch.device(device))


def set_budget(size: int | str | None, device: Device = "cpu") -> int | None:
    """Sets the budget for all tensors of the process on a device and returns the one before; None is no budget.

    An allocation beyond it raises torch.OutOfMemoryError, which an Accumulator answers with a smaller micro-batch. On a
    device whose allocator has no limit, plans keep to the budget and nothing enforces it. Raises UsageError for a device
    that does not exist, or has less memory.
    """
    return _change_budget(size, torch.device(device), is_new=True)


@contextlib.contextmanager
def budget(size: int | str | None, device: Device = "cpu") -> Iterator[None]:
    """set_budget() for the body of a with statement; the budget before comes back after it."""
    before = set_budget(size, device)
    try:
        yield
    finally:
        put_back(before, device)


def put_back(before: int | None, device: Device = "cpu") -> None:
    """Sets the budget that set_budget() returned. Never refused: what else the device holds may have changed since."""
    _change_budget(before, torch.device(device), is_new=False)


def _change_budget(size: int | str | None, device: torch.device, is_new: bool) -> int | None:
    if device.type == "cpu":
        install()
    else:
        _core.set_device_limiter(_limit_allocator)
    before = _core.set_budget(_core.no_budget if size is None else parse_size(size), device, is_new)
    return None if before == _core.no_budget else before


def _limit_allocator(device: torch.device, size: int) -> bool:
    """Makes a budget the limit of the device's allocator, if it has one: a share of its memory."""
    module = torch.get_device_module(device)
    if not hasattr(module, "set_per_process_memory_fraction"):
        return False
    # What the allocator takes its share of.
    total = module.get_device_properties(device).total_memory
    # Rounded up, so that a budget is never less than was stated.
    module.set_per_process_memory_fraction(min(1.0, math.nextafter(size / total, 1.0)), device)
    return True
