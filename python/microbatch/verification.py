"""Whether the gradient of a batch depends on how it is split, and why."""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from microbatch import _core, batches
from microbatch.devices import OnDevice, device_of
from microbatch.errors import UsageError
from microbatch.model import Adapter
from microbatch.planning import native_policy


@dataclasses.dataclass(frozen=True)
class Difference:
    """A parameter whose gradient changes when the batch is split."""

    parameter: str
    relative: float  #: |whole - split| / the larger of both


@dataclasses.dataclass(frozen=True)
class Cause:
    """Why a gradient depends on the split, and what to do about it."""

    name: str  #: averaged_loss, batch_statistics, randomness, coupled_samples, not_finite or unknown
    text: str


@dataclasses.dataclass(frozen=True)
class Verification:
    """The result of verify(): `print(result)` says what differs and why."""

    samples: int
    micro_batch: int
    tolerance: float  #: on Difference.relative
    loss_difference: float  #: of the mean losses, relative
    differences: tuple[Difference, ...]  #: above the tolerance, the largest first
    causes: tuple[Cause, ...]  #: likely ones, the worst first; empty if nothing differs

    @property
    def ok(self) -> bool:
        return not self.differences and not self.causes

    def __str__(self) -> str:
        split = f"{self.samples} samples as a whole and in micro-batches of {self.micro_batch}"
        if self.ok:
            return f"{split}: same gradients"
        lines = [f"{split}: the gradient depends on the split"]
        if self.differences:
            most = self.differences[0]
            lines[0] += f"; {len(self.differences)} parameters differ, {most.parameter} most (by {most.relative:.2g})"
        return "\n".join([*lines, *(f"    {cause.text}" for cause in self.causes)])


def verify(
    model: nn.Module,
    batch: Any,
    loss: Callable[[Any, Any], Any],
    *,
    micro_batch: int | None = None,
    length: int | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
    trim_padding: str | None = None,
    generators: Sequence[torch.Generator] = (),
    batch_norm: str = "naive",
) -> Verification:
    """Compares the gradients of the whole batch with those of the same batch in micro-batches, on your own model.

        print(mb.verify(model, batch, mb.losses.causal_lm))

    Finds a loss that is already averaged, layers that normalise over the micro-batch (BatchNorm), random numbers
    (dropout), and losses that mix samples (in-batch negatives, the balance of experts). A few samples are enough.

    micro_batch: samples in each; None: half of the batch. batch_norm: the policy by which the split batch runs; "exact"
    agrees with the whole one. The other arguments are those of an Accumulator.
    Leaves no trace: gradients are cleared; buffers, training mode and generators are restored.
    Raises UsageError unless 1 <= micro_batch < the batch, or if the batch has weight 0, and whatever the loss raises.
    Cost: at most ten passes over the batch, and three copies of the gradients.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"the model is a {type(model).__name__}, not a torch.nn.Module")
    source = batches.source_of(batch, length, collate, trim_padding)
    on_device = OnDevice(device_of(model))
    return verify_source(
        Adapter(model, None, generators), source, lambda micro: loss(model, on_device(micro)), micro_batch, batch_norm
    )


def verify_source(
    adapter: Adapter, source: Any, loss: Callable[[Any], Any], micro_batch: int | None, batch_norm: str
) -> Verification:
    if micro_batch is None:
        micro_batch = max(1, source.size // 2)
    found = _core.verify(adapter, source, loss, micro_batch, native_policy(batch_norm))
    return Verification(
        samples=source.size,
        micro_batch=micro_batch,
        tolerance=found.tolerance,
        loss_difference=found.loss_difference,
        differences=tuple(Difference(one.parameter, one.relative) for one in found.differences),
        causes=tuple(Cause(name, text) for name, text in found.causes),
    )


def check_first_batch(adapter: Adapter, source: Any, loss: Callable[[Any], Any], batch_norm: str) -> None:
    """Raises UsageError if the loss is averaged, and warns of anything else but random numbers.

    On up to 8 samples, or as many as memory allows.
    """
    samples = min(8, source.size)
    while samples >= 2:
        try:
            found = verify_source(adapter, source.head(samples), loss, None, batch_norm)
        except torch.OutOfMemoryError:
            samples //= 2
            continue
        names = {cause.name for cause in found.causes}
        if "averaged_loss" in names:
            raise UsageError(str(found))
        if names - {"randomness"}:
            warnings.warn(str(found), stacklevel=4)
        return
    warnings.warn("verify: two samples at once and three copies of the gradients do not fit in memory", stacklevel=4)
