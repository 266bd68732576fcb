"""A whole training run in a folder: plan, steps, log, checkpoints, report, and a resume with the same bits."""

import contextlib
import json
import math
import pathlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from microbatch import _core, planning
from microbatch.accumulator import Accumulator, LossFunction, check_bound
from microbatch.data import Data
from microbatch.errors import Error, Stopped, UsageError
from microbatch.interrupts import watched
from microbatch.memory import budget, format_size, parse_size
from microbatch.optimizers import AdamW
from microbatch.outcome import Outcome, failure_of, outcome_of
from microbatch.planning import PlanReport
from microbatch.progress import Progress
from microbatch.schedule import interval
from microbatch.verification import check_first_batch


class Trainer:
    """Trains a model with the batch you state, in the memory you name, and keeps the run in a folder.

        outcome = mb.Trainer(model, dataset, loss, batch=256, memory="4GiB", lr=3e-4, run="runs/x", resume=True).train()

    model: any nn.Module. data: a map-style dataset, with __len__ and __getitem__. loss: `loss(model, micro)` returns the
    sum over the micro-batch and what it is averaged over; see mb.losses. batch: samples per step.

    run: the folder; metrics.jsonl, TensorBoard events, checkpoints, model.safetensors and report.html are written there.
    resume: continues a run that is there, with the same bits as if it had never stopped, and starts it otherwise.
    steps, samples, tokens, epochs: how long; give one, or one epoch is made. memory: the budget of all CPU tensors
    during train(); None: four fifths of what is free. micro_batch, recompute, clip_norm, generators: as for an Accumulator.
    lr, schedule, warmup, final_lr, decay: see Schedule; without lr, the optimizer's own. optimizer: mb.AdamW or another;
    None: mb.AdamW, without weight decay for vectors. guard: refuses spikes, and rolls a run that diverges back, at most
    `restores` times. noise_every: steps from one measure of the gradient's noise to the next. collate_fn: makes a list of
    samples into a micro-batch; torch's default_collate if None. lengths: of each sample, or a function of a sample; a
    batch is then taken by length, and with bound="tokens" micro-batches of shorter samples hold more of them. workers:
    processes that load samples ahead. held_out: a dataset whose loss is measured at the end. verify: checks the first samples by mb.verify(). progress: shows it on the terminal or in the notebook.

    Raises UsageError for settings out of range, or if the folder has a run and `resume` is false.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        loss: LossFunction,
        *,
        batch: int,
        run: str | pathlib.Path,
        resume: bool = False,
        memory: int | str | None = None,
        lr: float | None = None,
        steps: int | None = None,
        samples: int | None = None,
        tokens: int | None = None,
        epochs: int | None = None,
        optimizer: Any = None,
        schedule: str | None = "cosine",
        warmup: int | str = 0,
        final_lr: float = 0.0,
        decay: int | str | None = None,
        clip_norm: float = 1.0,
        micro_batch: int | str = "auto",
        recompute: Any = "auto",
        guard: bool = True,
        restores: int = 3,
        noise_every: int = 20,
        checkpoint_every: int | str = 100,
        keep: int = 3,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        lengths: Sequence[int] | Callable[[Any], int] | None = None,
        bound: str = "samples",
        workers: int = 0,
        held_out: Any = None,
        tokens_per_sample: int = 1,
        generators: Sequence[Any] = (),
        seed: int = 1,
        verify: bool = True,
        progress: bool = True,
    ) -> None:
        _check_settings(batch, restores, noise_every, keep, workers, seed)
        if not isinstance(run, str | pathlib.Path) or not str(run):
            raise UsageError(f"run is {run!r}; it is the folder of the run")
        if not isinstance(guard, bool):
            raise UsageError("guard is True or False: the guard of a run is made by the Trainer")
        if lr is not None and (isinstance(lr, bool) or not isinstance(lr, int | float)):
            raise UsageError(f"lr is {lr!r}; it is a number")
        if tokens is not None and tokens_per_sample == 1:
            raise UsageError("tokens= needs tokens_per_sample=, the tokens that a sample counts as")
        _core.interval(interval(checkpoint_every))  # refused before the folder is made
        self.model, self.loss, self.batch = model, loss, batch
        self.run, self.resume = pathlib.Path(run), resume
        check_bound(bound, lengths is not None, "lengths")
        self.data = Data(
            data,
            collate_fn,
            lengths=lengths,
            by_tokens=bound == "tokens",
            workers=workers,
            seed=seed,
            tokens_per_sample=tokens_per_sample,
        )
        self.held_out = None if held_out is None else Data(held_out, collate_fn, tokens_per_sample=tokens_per_sample)
        self.length = _length(steps, samples, tokens, epochs, self.data.size)
        self.optimizer = _default_optimizer(model, lr) if optimizer is None else optimizer
        self._memory = None if memory is None else parse_size(memory)
        self.accumulator = Accumulator(
            model,
            self.optimizer,
            loss,
            micro_batch=micro_batch,
            recompute=recompute,
            clip_norm=clip_norm,
            generators=generators,
        )
        self._micro_batch = None if micro_batch == "auto" else micro_batch
        peak = lr if lr is not None else float(self.optimizer.param_groups[0]["lr"])
        schedule = schedule or "constant"
        self.schedule = self._schedule(schedule, peak, final_lr, warmup, decay)
        self._guard, self._restores, self._noise_every = guard, restores, noise_every
        self._checkpoint_every, self._keep, self._seed = interval(checkpoint_every), keep, seed
        self._verify, self._progress = verify, progress
        self.plan_report: PlanReport | None = None  #: of train()
        self._settings = {
            "model": type(model).__name__,
            "batch": batch,
            "optimizer": type(self.optimizer).__name__,
            "lr": peak,
            "schedule": schedule,
            "warmup": interval(warmup),
            "final-lr": final_lr,
            "length": self.length,
            "clip": clip_norm if math.isfinite(clip_norm) else "inf",
            "seed": seed,
            "data-samples": self.data.size,
            "guard": guard,
        }

    def train(self, on_step: Callable[[dict[str, Any]], None] | None = None) -> Outcome:
        """Trains until the run has its length.

        on_step: called after every step with what its line of metrics.jsonl says of loss, rate, norm and time.
        Ctrl-C ends the run after the micro-batch with a checkpoint, and raises KeyboardInterrupt; resume=True continues
        in the middle of the batch. So does an exception of on_step, which passes.
        Raises DoesNotFit if nothing fits the budget, Stopped if the run diverged or ended worse than it began, UsageError
        or BadData if the run in the folder is another one.
        """
        shown = Progress(self.length, self._progress)
        try:
            folder = _core.RunFolder(str(self.run), self.resume)
        except UsageError as error:
            raise UsageError(str(error).replace("--resume", "resume=True")) from None
        try:
            with contextlib.nullcontext() if self._memory is None else budget(self._memory):
                return self._train_in(folder, shown, on_step)
        finally:
            folder.close()  # whoever keeps the traceback does not keep the lock
            shown.close()
            self.data.close()

    def _train_in(self, folder: Any, shown: Progress, on_step: Callable[[dict[str, Any]], None] | None) -> Outcome:
        if not self.model.training:
            self.model.train()
        for warning in folder.warnings:
            shown.note(f"warning: {warning}")
        recorded = self._recorded(folder, shown) if folder.has_state else None
        report = self._make_plan(recorded)
        folder.lock()
        if recorded is None and self._verify:
            self._check()
        shown.note(self._describe(folder))
        run = _core.Run(
            folder, self.accumulator._native, self.data, self._loss_of_micro, report, self._run_settings(), shown
        )
        try:
            shown.begin(run.outcome, on_step)
            with watched(shown):
                run.train()
            shown.close()
            return self._conclude(run)
        finally:
            made = run.outcome
            if made.progress.steps == 0 and not made.checkpointed and made.resumed_from is None:
                run.remove_unused()
            del made
            run.close()

    def _loss_of_micro(self, micro: Any) -> Any:
        return self.loss(self.model, micro)

    def _schedule(self, shape: str, peak: float, floor: float, warmup: int | str, decay: int | str | None) -> Any:
        count, unit = _core.interval(self.length)

        def in_unit(value: int | str) -> str:
            return str(_core.convert(interval(value), unit, self.batch, self.data.tokens_per_sample))

        if decay is not None and shape != "wsd":
            raise UsageError(f"decay is for the schedule 'wsd', not for {shape!r}")
        if shape == "wsd":
            decay = f"{max(1, count // 5)} {unit}" if decay is None else in_unit(decay)
        return _core.Schedule(shape, peak, floor, in_unit(warmup), self.length, decay or "", 2.0)

    def _recorded(self, folder: Any, shown: Progress) -> dict[str, Any]:
        """The settings of the run to resume; notes what has changed. Raises UsageError if it is another run."""
        before = _recorded_in(folder)
        changed = {name: (before.get(name), now) for name, now in self._settings.items() if before.get(name) != now}
        fixed = [name for name in ("model", "batch", "optimizer", "seed", "data-samples") if name in changed]
        if fixed:
            said = "; ".join(f"{name} was {changed[name][0]}, is {changed[name][1]}" for name in fixed)
            raise UsageError(f"the run in {self.run} is another one: {said}; restore these, or name another folder")
        if changed and not folder.is_healthy():
            folder.use_healthy()  # this is the way out of a divergence
        for name, (was, now) in changed.items():
            said = f"resume: {name} was {was}, is {now}"
            if self._progress:
                shown.note(said)
            else:
                warnings.warn(said, stacklevel=4)
        before["same_budget"] = before.get("memory") == self._budget_text()
        if not before["same_budget"]:
            folder.forget_caps()
        return before

    def _budget_text(self) -> str:
        return "auto" if self._memory is None else format_size(self._memory)

    def _make_plan(self, recorded: dict[str, Any] | None) -> Any:
        """Measures the plan, or that of the run to resume, if the budget is the same; returns the library's report."""
        source = _Longest(self.data, self.batch)
        micro_batch = self._micro_batch
        accumulator = self.accumulator
        if micro_batch is None and recorded is not None and recorded["same_budget"]:
            micro_batch = recorded["micro-batch"]
            if accumulator._recompute == "auto":
                accumulator._recompute = "always" if recorded["recompute"] else "never"
        report = accumulator._measured_plan(source, self._loss_of_micro, micro_batch)  # type: ignore[arg-type]
        self.plan_report = planning.report_of(report)
        accumulator.plan = self.plan_report.plan
        return report

    def _check(self) -> None:
        samples = min(8, self.data.size)
        if samples < 2:
            return
        try:
            check_first_batch(self.accumulator._adapter, _Samples(self.data, samples), self._loss_of_micro)
        except UsageError as error:
            raise UsageError(f"verify: {error}") from None

    def _describe(self, folder: Any) -> str:
        assert self.plan_report is not None
        plan = self.plan_report.plan
        state = f"; resumes at step {folder.steps()}" if folder.has_state else ""
        return (
            f"{self.run}: a batch of {self.batch} in micro-batches of {plan.micro_batch}"
            f"{' with recompute' if plan.recompute else ''}; predicted peak "
            f"{format_size(self.plan_report.chosen.peak_bytes)} of "
            f"{format_size(self.plan_report.budget_bytes)}; {self.length}{state}"
        )

    def _run_settings(self) -> dict[str, Any]:
        assert self.plan_report is not None
        plan = self.plan_report.plan
        recorded = self._settings | {
            "memory": self._budget_text(),
            "micro-batch": plan.micro_batch,
            "recompute": plan.recompute,
        }
        self._recorded_settings = recorded
        return {
            "batch": self.batch,
            "length": self.length,
            "schedule": self.schedule,
            "seed": self._seed,
            "noise_every": self._noise_every,
            "guard": self._guard,
            "restores": self._restores,
            "folder": str(self.run),
            "checkpoint_every": self._checkpoint_every,
            "keep": self._keep,
            "config": "".join(f"{name} = {json.dumps(value)}\n" for name, value in recorded.items()),
            "notes": {"python": json.dumps(recorded)},
        }

    def _conclude(self, run: Any) -> Outcome:
        """Measures the held-out loss, writes the report, and raises what the end of the run calls for."""
        outcome = run.outcome
        if run.done and outcome.progress.steps > 0 and not outcome.diverged:
            if self.held_out is not None:
                outcome.held_out = self._held_out_loss()
            _core.judge_end(outcome, str(self.run))
        failure = failure_of(outcome)
        banner = failure or ("Interrupted before its end." if outcome.interrupted else "")
        if outcome.progress.steps > 0:
            settings = [(name, str(value)) for name, value in self._recorded_settings.items()]
            _core.write_run_report(str(self.run), settings, banner, outcome.held_out)
        if lost := run.flush():
            raise Error(f"{lost}; its last lines are lost")
        if outcome.interrupted:
            raise KeyboardInterrupt
        if failure:
            raise Stopped(failure)
        return outcome_of(outcome, str(self.run))

    def _held_out_loss(self) -> float:
        flags = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            return float(_core.mean_loss(self.held_out, self._loss_of_micro, self.accumulator.plan.micro_batch))
        finally:
            for module, flag in flags:
                module.training = flag


class _Longest:
    """A batch of copies of the sample that takes the most memory, for which the plan is made."""

    def __init__(self, data: Data, size: int) -> None:
        self.data, self.size = data, size

    def as_many_as(self, begin: int, samples: int) -> int:
        return samples

    def fetch(self, begin: int, end: int) -> Any:
        return self.data.get([self.data.longest_sample] * (end - begin))


class _Samples:
    """The first samples of the data."""

    def __init__(self, data: Data, size: int) -> None:
        self.data, self.size = data, size

    def as_many_as(self, begin: int, samples: int) -> int:
        return samples

    def fetch(self, begin: int, end: int) -> Any:
        return self.data.get(list(range(begin, end)))

    def fetch_twice(self) -> Any:
        return self.data.get([*range(self.size), *range(self.size)])

    def head(self, samples: int) -> "_Samples":
        return _Samples(self.data, samples)


def _recorded_in(folder: Any) -> dict[str, Any]:
    try:
        found = json.loads(folder.note("python"))
    except Error:
        raise UsageError("the run in the folder was not started from Python: resume it with the command") from None
    return dict(found)


def _check_settings(batch: Any, restores: Any, noise_every: Any, keep: Any, workers: Any, seed: Any) -> None:
    _require_count("batch", batch, 1)
    _require_count("keep", keep, 1)
    for name, value in (("restores", restores), ("noise_every", noise_every), ("workers", workers), ("seed", seed)):
        _require_count(name, value, 0)


def _require_count(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UsageError(f"{name} is {value!r}; it is a whole number, at least {least}")


def _length(steps: int | None, samples: int | None, tokens: int | None, epochs: int | None, size: int) -> str:
    lengths = {"steps": steps, "samples": samples, "tokens": tokens, "epochs": epochs}
    given = [(unit, count) for unit, count in lengths.items() if count is not None] or [("epochs", 1)]
    if len(given) > 1:
        raise UsageError(f"give one of {', '.join(unit for unit, _ in given)}: each says how long the run is")
    unit, count = given[0]
    _require_count(unit, count, 1)
    return f"{count * size} samples" if unit == "epochs" else f"{count} {unit}"


def _default_optimizer(model: nn.Module, lr: float | None) -> AdamW:
    trained = [one for one in model.parameters() if one.requires_grad]
    if not trained:
        raise UsageError("no parameter of the model requires a gradient")
    groups = [
        {"params": [one for one in trained if one.dim() >= 2], "weight_decay": 0.1},
        {"params": [one for one in trained if one.dim() < 2], "weight_decay": 0.0},
    ]
    return AdamW([group for group in groups if group["params"]], lr=1e-3 if lr is None else lr)
