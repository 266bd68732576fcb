"""Shows a run: a bar on a terminal or in a notebook, a line now and then in a pipe."""

import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

from microbatch import _core, memory

QUIET_SECONDS = 10.0  # between two lines in a pipe


class Progress:
    """What the library's Run tells of its steps."""

    def __init__(self, length: str, shown: bool) -> None:
        self._count, self._unit = _core.interval(length)
        self._shown = shown
        self._bar: Any = None
        self._on_step: Callable[[dict[str, Any]], None] | None = None
        self._stops = False
        self._last = 0.0

    def begin(self, outcome: Any, on_step: Callable[[dict[str, Any]], None] | None) -> None:
        self._on_step = on_step
        if self._shown and _redraws():
            self._bar = _bar(self._count, getattr(outcome.progress, self._unit), self._unit.removesuffix("s"))

    def ask_to_stop(self) -> None:
        self._stops = True

    def stops(self) -> bool:
        return self._stops

    def on_step(self, outcome: Any) -> None:
        for event in _events(outcome):
            self.note(event)
        if self._bar is not None:
            self._bar.set_postfix_str(_numbers(outcome), refresh=False)
            self._bar.update(getattr(outcome.progress, self._unit) - self._bar.n)
        elif self._shown and (self._is_last(outcome) or time.monotonic() - self._last > QUIET_SECONDS):
            self._last = time.monotonic()
            _write(f"step {outcome.progress.steps}: {_numbers(outcome)}")
        if self._on_step is not None:
            self._on_step(_values(outcome))

    def on_note(self, text: str) -> None:
        """A warning of the library."""
        if self._shown:
            self.note(text)
        else:
            warnings.warn(text.removeprefix("warning: "), stacklevel=4)

    def note(self, text: str) -> None:
        if not self._shown:
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            _write(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _is_last(self, outcome: Any) -> bool:
        return bool(getattr(outcome.progress, self._unit) >= self._count)


def _bar(count: int, at: int, unit: str) -> Any:
    """None without tqdm: there are lines then."""
    try:
        from tqdm.auto import tqdm  # type: ignore[import-untyped]
    except ImportError:
        return None
    return tqdm(total=count, initial=at, unit=unit, unit_scale=count > 9999)


def _redraws() -> bool:
    return sys.stderr is not None and (sys.stderr.isatty() or "ipykernel" in sys.modules)


def _write(text: str) -> None:
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        pass  # a reader that went away does not end a run


def _numbers(outcome: Any) -> str:
    last = outcome.last
    return f"loss {last.loss:.4f}, rate {last.learning_rate:.3g}, peak {memory.format_size(outcome.peak_bytes)}"


def _events(outcome: Any) -> list[str]:
    """What is rare enough for a line of its own."""
    last, step = outcome.last, outcome.progress.steps
    events = []
    if last.out_of_memory > 0:
        recompute = " with recompute" if last.plan.recompute else ""
        events.append(f"step {step}: out of memory; repeated in micro-batches of {last.plan.micro_batch}{recompute}")
    if not last.applied and last.weight != 0.0:
        events.append(f"step {step}: refused: {last.reason}")
    if outcome.rolled_back_to is not None:
        events.append(f"step {step}: diverged; rolled back to the weights of step {outcome.rolled_back_to}")
    if outcome.warning:
        events.append(outcome.warning)
    return events


def _values(outcome: Any) -> dict[str, Any]:
    last, at = outcome.last, outcome.progress
    return {
        "step": at.steps,
        "samples": at.samples,
        "tokens": at.tokens,
        "loss": last.loss,
        "weight": last.weight,
        "learning_rate": last.learning_rate,
        "gradient_norm": last.gradient_norm,
        "micro_batches": last.micro_batches,
        "step_seconds": outcome.step_seconds,
        "applied": last.applied,
        "reason": last.reason,
    }
