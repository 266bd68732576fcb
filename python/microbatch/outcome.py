"""What became of a run."""

import dataclasses
from typing import Any

from microbatch import planning
from microbatch.planning import Plan


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The results of a run."""

    run: str  #: its folder
    steps: int
    samples: int
    tokens: int
    first_loss: float
    loss: float  #: of the last batch
    held_out_loss: float | None
    seconds: float  #: of training, over all processes of the run
    step_seconds: float  #: the median
    plan: Plan  #: with which full batches were run at the end
    peak_bytes: int
    predicted_peak_bytes: int
    out_of_memory: int  #: how often a batch was begun again with a smaller plan
    refused: int  #: steps that were not applied
    restores: int  #: how often the run was rolled back
    noise_batch: float | None  #: samples at which the noise is as large as the gradient
    resumed_from: int | None  #: the step
    overfits: bool  #: the held-out loss is above the first losses


def outcome_of(outcome: Any, run: str) -> Outcome:
    """Of the library's outcome of the run in this folder."""
    at = outcome.progress
    return Outcome(
        run=run,
        steps=at.steps,
        samples=at.samples,
        tokens=at.tokens,
        first_loss=outcome.first_loss,
        loss=outcome.last.loss,
        held_out_loss=outcome.held_out,
        seconds=outcome.seconds,
        step_seconds=outcome.median_step_seconds,
        plan=planning.from_native(outcome.plan),
        peak_bytes=outcome.peak_bytes,
        predicted_peak_bytes=outcome.predicted_peak_bytes,
        out_of_memory=outcome.out_of_memory,
        refused=outcome.refused,
        restores=outcome.restores,
        noise_batch=outcome.noise_batch,
        resumed_from=outcome.resumed_from,
        overfits=outcome.overfits,
    )


def failure_of(outcome: Any) -> str:
    """What a run that diverged, or ended worse than it began, says of it; empty for any other."""
    cure = "start anew in another folder, with a lower lr, a warmup or a smaller clip_norm"
    if outcome.refused >= outcome.progress.steps > 0 and outcome.last.weight == 0.0:
        return "no step was applied: every batch has weight 0; what does the loss function return?"
    if outcome.diverged:
        if outcome.healthy_checkpoint is not None:
            cure = (
                f"resume from the healthy checkpoint of step {outcome.healthy_checkpoint} (resume=True), or start anew in "
                "another folder, with a lower lr, a warmup or a smaller clip_norm"
            )
        return f"the run diverged at step {outcome.progress.steps}: {outcome.last.reason}; {cure}"
    if outcome.ended_worse:
        held_out = "" if outcome.held_out is None else f", {outcome.held_out:.4g} held out"
        return (
            f"the run ended worse than it began: the loss was {outcome.first_loss:.4g} at the first step and "
            f"{outcome.last.loss:.4g} at the last{held_out}; {cure}"
        )
    return ""
