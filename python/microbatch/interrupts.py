"""Ctrl-C as a request: the run ends after the micro-batch, with a checkpoint."""

import contextlib
import signal
import threading
import types
from collections.abc import Iterator
from typing import Protocol


class Stoppable(Protocol):
    def ask_to_stop(self) -> None: ...


@contextlib.contextmanager
def watched(run: Stoppable) -> Iterator[None]:
    """The first SIGINT or SIGTERM asks the run to stop; a second SIGINT raises KeyboardInterrupt at once.

    Outside the main thread, where Python delivers no signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {}

    def ask(number: int, frame: types.FrameType | None) -> None:
        run.ask_to_stop()
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, ask)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def ignored_by_children() -> Iterator[None]:
    """Processes that are started in the body ignore Ctrl-C, which a terminal sends to all: the run ends by itself."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
