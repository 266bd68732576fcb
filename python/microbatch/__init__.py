"""Train a PyTorch model with the batch size you want in the memory you have.

    import microbatch as mb

    accumulator = mb.Accumulator(model, optimizer, loss, memory="4GiB")
    for batch in loader:                     # whole batches
        report = accumulator.step(batch)     # one exact update, however the batch was cut

`loss(model, micro)` returns the sum of the loss over a micro-batch and what it is averaged over. The package is a thin
layer over the C++ library of the same name: both make the same update, bit for bit.
"""

from microbatch import _torch_version

_torch_version.require()

from microbatch import integrations, losses, memory  # noqa: E402
from microbatch.accumulator import Accumulator, StepReport  # noqa: E402
from microbatch.advice import BatchAdvice, BatchCost, advise  # noqa: E402
from microbatch.batch_norm import ChannelRMSNorm, Replaced, replace_batch_norm  # noqa: E402
from microbatch.errors import BadData, DoesNotFit, Error, LostRank, NotWritten, Stopped, UsageError  # noqa: E402
from microbatch.guard import SpikeGuard  # noqa: E402
from microbatch.hessian import Curvature, curvature  # noqa: E402
from microbatch.optimize import Optimized, optimize  # noqa: E402
from microbatch.optimizers import SGD, AdamW  # noqa: E402
from microbatch.outcome import Outcome  # noqa: E402
from microbatch.planning import Candidate, Plan, PlanReport, plan  # noqa: E402
from microbatch.schedule import Constants, Schedule, ScheduleDriver, scale_to_batch  # noqa: E402
from microbatch.trainer import Trainer  # noqa: E402
from microbatch.verification import Cause, Difference, Verification, verify  # noqa: E402

__version__ = "0.2.0"

__all__ = [
    "SGD",
    "Accumulator",
    "AdamW",
    "BadData",
    "BatchAdvice",
    "BatchCost",
    "Candidate",
    "Cause",
    "ChannelRMSNorm",
    "Constants",
    "Curvature",
    "Difference",
    "DoesNotFit",
    "Error",
    "LostRank",
    "NotWritten",
    "Outcome",
    "Optimized",
    "Plan",
    "PlanReport",
    "Replaced",
    "Schedule",
    "ScheduleDriver",
    "SpikeGuard",
    "StepReport",
    "Stopped",
    "Trainer",
    "UsageError",
    "Verification",
    "advise",
    "curvature",
    "integrations",
    "losses",
    "memory",
    "optimize",
    "plan",
    "replace_batch_norm",
    "scale_to_batch",
    "verify",
]
