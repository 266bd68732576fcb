"""The fastest way to run a batch within a memory budget, measured on the job itself."""

import dataclasses
import typing
from typing import Any

import torch

from microbatch import _core, memory
from microbatch.errors import DoesNotFit, UsageError

if typing.TYPE_CHECKING:
    from microbatch.accumulator import Accumulator


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a batch is run."""

    micro_batch: int  #: samples per forward and backward
    recompute: bool = False  #: activations of the model's blocks are computed again in backward
    batch_norm: str = "naive"  #: what BatchNorm layers do: "naive", "deferred", "frozen" or "exact"


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to run the batch, with its peak and time: measured, or predicted from others."""

    plan: Plan
    micro_batches: int
    peak_bytes: int  #: 0 if unknown
    step_seconds: float  #: of the whole batch; 0 if unknown
    measured: bool
    fits: bool


@dataclasses.dataclass(frozen=True)
class PlanReport:
    """All ways that were considered, and the decision. `print(report)` shows them as a table."""

    batch: int
    budget_bytes: int
    chosen: Candidate
    candidates: tuple[Candidate, ...]
    why: str
    batch_norm: str  #: what BatchNorm layers do, and why; empty if the model has none
    update_seconds: float  #: one optimizer step
    spent_seconds: float  #: on measuring

    @property
    def plan(self) -> Plan:
        return self.chosen.plan

    def __str__(self) -> str:
        rows = [("", "micro-batch", "recompute", "peak", "time per step")]
        for one in self.candidates:
            mark = "chosen" if one == self.chosen else "" if one.fits else "too large"
            size = memory.format_size(one.peak_bytes) if one.peak_bytes else "-"
            time = f"{1e3 * one.step_seconds:.1f} ms{'' if one.measured else ' predicted'}" if one.step_seconds else "-"
            rows.append((mark, str(one.plan.micro_batch), "yes" if one.plan.recompute else "no", size, time))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        if self.batch_norm:
            lines.append(f"BatchNorm {self.batch_norm}")
        return "\n".join([f"batch {self.batch}, budget {memory.format_size(self.budget_bytes)}: {self.why}", *lines])


def plan(accumulator: "Accumulator", batch: Any, *, memory: int | str | None = None, length: int | None = None) -> PlanReport:
    """Finds the fastest plan for batches like this one and gives it to the accumulator: see Accumulator.make_plan().

        print(mb.plan(accumulator, batch, memory="2GiB"))

    batch: the longest that there will be. Raises DoesNotFit if nothing fits.
    """
    return accumulator.make_plan(batch, memory=memory, length=length)


def native(plan: Plan) -> Any:
    return _core.Plan(plan.micro_batch, plan.recompute, native_policy(plan.batch_norm))


def from_native(plan: Any) -> Plan:
    return Plan(plan.micro_batch, plan.recompute, plan.batch_norm.name)


def native_policy(name: str) -> Any:
    """Raises UsageError for a name that a plan cannot have."""
    try:
        return _core.BatchNorm.__members__[name]
    except KeyError:
        raise UsageError(f"the plan's batch_norm is {name!r}; it is 'naive', 'deferred', 'frozen' or 'exact'") from None


def report_of(report: Any) -> PlanReport:
    """Raises DoesNotFit if nothing fits, saying how much is missing and what would help."""
    if not report.fits:
        raise DoesNotFit(report.explain_misfit())
    candidates = [_candidate(one) for one in report.candidates]
    chosen = _candidate(report.choice())
    return PlanReport(
        report.batch,
        report.budget_bytes,
        chosen,
        tuple(candidates),
        report.why,
        report.batch_norm,
        report.update_seconds,
        report.spent_seconds,
    )


def _candidate(one: Any) -> Candidate:
    return Candidate(
        from_native(one.plan), one.micro_batches, one.peak_bytes, one.step_seconds, one.time_measured, one.fits
    )


def default_budget(device: torch.device) -> int:
    """The budget of plans, in bytes: the device's, or what this process has there and four fifths of what is free."""
    stats = memory.stats(device)
    if stats.budget_bytes is not None:
        return stats.budget_bytes
    there = 0 if device.type == "cpu" else stats.live_bytes
    return there + memory.available(device) // 5 * 4
