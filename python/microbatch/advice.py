"""Which batch size pays, from the noise of the gradient and the speed of the machine."""

import dataclasses
import typing
from collections.abc import Iterable
from typing import Any

from microbatch import _core, planning
from microbatch.errors import UsageError

if typing.TYPE_CHECKING:
    from microbatch.accumulator import Accumulator


@dataclasses.dataclass(frozen=True)
class BatchCost:
    """What a batch size costs, relative to the best one."""

    batch: int
    micro_batch: int  #: the fastest into which it is split
    step_seconds: float
    steps: float  #: to the same loss, relative to the fewest that any batch needs
    samples: float  #: to the same loss, relative to the fewest
    time: float  #: to the same loss, relative to the fastest


@dataclasses.dataclass(frozen=True)
class BatchAdvice:
    """Batch sizes side by side; `print(advice)` shows the table."""

    noise_batch: float  #: samples at which the noise is as large as the gradient: a proxy for the critical batch
    measures: int
    few_steps: int  #: the smallest batch within 10 % of the fewest steps
    few_samples: int  #: the largest batch within 10 % of the fewest samples
    fastest: int  #: the batch that reaches the same loss first on this machine
    accumulation_pays: bool  #: the fastest is split, and at least 5 % faster than any that is not
    table: tuple[BatchCost, ...]

    def __str__(self) -> str:
        lines = [
            f"noise as large as the gradient at a batch of {self.noise_batch:.0f} samples ({self.measures} measures)",
            f"{'batch':>8}  {'micro-batch':>11}  {'time per step':>13}  {'steps':>7}  {'samples':>7}  {'time':>7}",
        ]
        for one in self.table:
            mark = "  fastest" if one.batch == self.fastest else ""
            lines.append(
                f"{one.batch:>8}  {one.micro_batch:>11}  {1e3 * one.step_seconds:>10.1f} ms  {one.steps:>5.2f} x  "
                f"{one.samples:>5.2f} x  {one.time:>5.2f} x{mark}"
            )
        pays = "pays" if self.accumulation_pays else "does not pay"
        return "\n".join([*lines, f"splitting a batch (accumulation) {pays} here"])


def advise(accumulator: "Accumulator", batches: Iterable[Any], *, samples: int) -> BatchAdvice:
    """Measures the gradient noise over some batches at the parameters as they are, and compares batch sizes.

        print(mb.advise(accumulator, itertools.islice(loader, 20), samples=len(dataset)))

    batches: whole batches, of the size that the accumulator is meant for. samples: of the whole data set.
    Nothing is trained, and the accumulator keeps its plan. The speeds are measured on the first batch.
    Raises UsageError if no batch could be split, or the noise hides the gradient: give more, or larger, batches.
    Source: McCandlish et al. 2018, equation 2.11. Language models can use batches several times as large (Merrill et al.
    2025). Cost: one gradient per batch.
    """
    report, plan, noise, measures, per_sample = None, None, _core.NoiseAverage(0.95), 0, 1.0
    try:
        for batch in batches:
            if report is None:
                source, function = accumulator._sourced(batch, None, None)
                report = accumulator._measured_plan(source, function)
                planning.report_of(report)  # raises DoesNotFit
                plan = accumulator._native.plan
                accumulator._native.plan = _core.plan_with_noise(report)
            measure, step = accumulator._measured_noise(batch)
            if measure is not None:
                noise.add(measure)
                measures += 1
                per_sample = report.batch / step.weight
    finally:
        if plan is not None:
            accumulator._native.plan = plan
    noise_batch = noise.noise_batch()
    if report is None or noise_batch is None:
        why = "the noise hides the gradient" if measures else "no batch was split"
        raise UsageError(f"advise: {why} ({measures} measures); give more, or larger, batches")
    found = _core.advise_batch(noise_batch * per_sample, report, samples)
    return BatchAdvice(
        noise_batch=found.noise_batch,
        measures=measures,
        few_steps=_core.batch_of_few_steps(found.noise_batch),
        few_samples=_core.batch_of_few_samples(found.noise_batch),
        fastest=found.table[found.soonest].batch,
        accumulation_pays=found.accumulation_pays,
        table=tuple(
            BatchCost(one.batch, one.micro_batch, one.step_seconds, one.steps, one.samples, one.time) for one in found.table
        ),
    )
