"""Learning rates over a run, and how they follow the batch size."""

import dataclasses
from typing import Any

from microbatch import _core
from microbatch.errors import BadData, UsageError


class Schedule:
    """Linear warmup to the peak, then a shape down to the floor; `length` ends it.

        scheduler = mb.Schedule("cosine", peak=3e-4, length="10k steps", warmup="500 steps").drive(optimizer)
        for batch in loader:
            accumulator.step(batch)
            scheduler.step()                  # or step(samples=..., tokens=...)

    shape: "constant", "linear", "cosine", "wsd" (decays during the last `decay`) or "polynomial" (of `power`).
    peak, floor: learning rates. length, warmup, decay: such as "10k steps", "1M samples" or "2G tokens", all in one unit;
    a number alone counts steps. Only "constant" needs no length.

    The rate depends only on the progress of the run: after a resume it is the same. Raises UsageError naming what is
    wrong. Source: docs/how-it-works.md.
    """

    def __init__(
        self,
        shape: str = "cosine",
        *,
        peak: float,
        length: int | str | None = None,
        warmup: int | str | None = None,
        floor: float = 0.0,
        decay: int | str | None = None,
        power: float = 2.0,
    ) -> None:
        for name, value in (("peak", peak), ("floor", floor), ("power", power)):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise UsageError(f"{name} is {value!r}; it is a number")
        if decay is not None and shape != "wsd":
            raise UsageError(f"decay is for the shape 'wsd', not for {shape!r}")
        #: what the schedule counts: steps, samples or tokens
        self.unit: str = next((_core.interval(interval(one))[1] for one in (length, warmup) if one is not None), "steps")
        self._text = f"{shape}, peak={peak:g}, length={length!r}, warmup={warmup!r}, floor={floor:g}"
        self._native: Any = _core.Schedule(
            shape, peak, floor, interval(warmup), interval(length), interval(decay), power
        )

    def rate(self, *, steps: int = 0, samples: int = 0, tokens: int = 0, batch: int = 1, batch_tokens: int = 1) -> float:
        """The learning rate of the step that begins after so many steps, samples or tokens.

        batch, batch_tokens: samples and tokens of that step.
        """
        given = {"steps": steps, "samples": samples, "tokens": tokens}
        if not given[self.unit] and any(given.values()):
            raise UsageError(f"the schedule counts {self.unit}: give {self.unit}=")
        before = _core.Progress(steps, samples, tokens)
        return float(self._native.rate(before, _core.Progress(1, batch, batch_tokens)))

    def drive(self, optimizer: Any) -> "ScheduleDriver":
        """Sets the optimizer's learning rate from now on; the ratios between its parameter groups stay."""
        return ScheduleDriver(self, optimizer)

    def __repr__(self) -> str:
        return f"Schedule({self._text})"


class ScheduleDriver:
    """Drives any optimizer with `param_groups` by a Schedule; used like a scheduler of torch.

        scheduler = mb.Schedule("linear", peak=1e-3, length="1M samples").drive(optimizer)
        scheduler.step(samples=len(batch["input_ids"]))
        print(scheduler.get_last_lr())

    A schedule in samples or tokens takes the size of the next batch to be that of the last one.
    """

    def __init__(self, schedule: Schedule, optimizer: Any) -> None:
        if not hasattr(optimizer, "param_groups"):
            raise UsageError(f"the optimizer is a {type(optimizer).__name__}; a schedule needs its param_groups")
        self.schedule, self.optimizer = schedule, optimizer
        first = float(optimizer.param_groups[0]["lr"])
        self._ratios = [float(group["lr"]) / first if first else 1.0 for group in optimizer.param_groups]
        self._at = {"steps": 0, "samples": 0, "tokens": 0}
        self._last = {"samples": 1, "tokens": 1}
        self._set()

    def step(self, *, samples: int | None = None, tokens: int | None = None) -> None:
        """After a batch of so many samples and tokens: sets the learning rate of the next one.

        Raises UsageError if the schedule counts samples or tokens, and they are not given.
        """
        given = {"samples": samples, "tokens": tokens}
        if given.get(self.schedule.unit, 0) is None:
            raise UsageError(f"the schedule counts {self.schedule.unit}: call step({self.schedule.unit}=...)")
        self._last = {unit: 1 if count is None else count for unit, count in given.items()}
        self._at = {"steps": self._at["steps"] + 1} | {unit: self._at[unit] + self._last[unit] for unit in self._last}
        self._set()

    def get_last_lr(self) -> list[float]:
        """The learning rates of the parameter groups now."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """The progress of the run."""
        return {"at": dict(self._at), "last": dict(self._last)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues at a state_dict(). Raises BadData if it is not one."""
        if set(state) != {"at", "last"} or set(state["at"]) != set(self._at) or set(state["last"]) != set(self._last):
            raise BadData(f"this is not the state of a schedule: {state!r:.80}")
        self._at, self._last = dict(state["at"]), dict(state["last"])
        self._set()

    def _set(self) -> None:
        rate = self.schedule.rate(**self._at, batch=self._last["samples"], batch_tokens=self._last["tokens"])
        for group, ratio in zip(self.optimizer.param_groups, self._ratios, strict=False):
            group["lr"] = rate * ratio


@dataclasses.dataclass(frozen=True)
class Constants:
    """An optimizer's constants for a batch size."""

    lr: float
    betas: tuple[float, float]
    eps: float


def scale_to_batch(
    rule: str,
    *,
    lr: float,
    reference_batch: int,
    batch: int,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> Constants:
    """The constants for `batch` that correspond to those tuned for `reference_batch`.

        constants = mb.scale_to_batch("sqrt", lr=3e-4, reference_batch=32, batch=128)
        optimizer = mb.AdamW(model.parameters(), lr=constants.lr, betas=constants.betas, eps=constants.eps)

    rule: "linear" (SGD), "sqrt" (Adam), "adam-sde" (scales Adam's betas and eps too), "beta2-time" (keeps the half-life of
    the second moment) or "none". Raises UsageError where a rule is undefined, such as a batch too large for the betas.
    Source: Goyal et al. 2017; Krizhevsky 2014; Malladi et al. 2022, definition 5.2; Marek et al. 2025.
    """
    rate, beta1, beta2, epsilon = _core.scale_to_batch(lr, *betas, eps, rule, reference_batch, batch)
    return Constants(rate, (beta1, beta2), epsilon)


def interval(value: int | str | None) -> str:
    """An interval as the library reads it; "" for None. A number alone counts steps. Raises UsageError."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise UsageError(f"an interval is a number of steps or text such as '100 steps', not {value!r}")
    return f"{value} steps" if isinstance(value, int) else value
