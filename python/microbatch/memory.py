"""Memory of CPU tensors: what is live, the peak, and a budget that is enforced.

Counting begins with the first Accumulator or budget of the process; tensors made before are not counted, except the
parameters of a model that an Accumulator takes over. Sizes are bytes, or text such as "4GiB".

    with mb.memory.budget("512MiB"):
        accumulator.step(batch)
    print(mb.memory.format_size(mb.memory.peak()), mb.memory.stats())
"""

import contextlib
import dataclasses
from collections.abc import Iterator

from microbatch import _core
from microbatch.errors import UsageError

__all__ = ["Stats", "available", "budget", "format_size", "install", "parse_size", "peak", "reset_peak", "set_budget", "stats"]


@dataclasses.dataclass(frozen=True)
class Stats:
    """Bytes of this process's CPU tensors; zeros before counting begins."""

    live_bytes: int
    peak_bytes: int  #: the most that was live since reset_peak()
    cached_bytes: int  #: freed blocks kept for reuse, not in live_bytes
    budget_bytes: int | None  #: None: no budget


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


def stats() -> Stats:
    live, peak_bytes, cached = _core.memory_use()
    limit = _core.budget()
    return Stats(live, peak_bytes, cached, None if limit == _core.no_budget else limit)


def peak() -> int:
    """The most bytes that were live at once since reset_peak()."""
    return stats().peak_bytes


def reset_peak() -> None:
    """Lets the peak begin again at what is live now."""
    _core.reset_peak()


def available() -> int:
    """Bytes that this process can still take: the system's, or what is left of the container's limit."""
    return _core.available_memory()


def set_budget(size: int | str | None) -> int | None:
    """Sets the budget for all CPU tensors of the process and returns the one before; None is no budget.

    An allocation beyond it raises torch.OutOfMemoryError, which an Accumulator answers with a smaller micro-batch.
    """
    install()
    before = _core.set_budget(_core.no_budget if size is None else parse_size(size))
    return None if before == _core.no_budget else before


@contextlib.contextmanager
def budget(size: int | str | None) -> Iterator[None]:
    """set_budget() for the body of a with statement; the budget before comes back after it."""
    before = set_budget(size)
    try:
        yield
    finally:
        set_budget(before)
