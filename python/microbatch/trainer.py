"""A whole training run in a folder: plan, steps, log, checkpoints, report, and a resume with the same bits."""

import contextlib
import math
import pathlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from microbatch import _core, planning, resume
from microbatch.accumulator import Accumulator, LossFunction, check_bound
from microbatch.data import Data, Examples, Longest
from microbatch.errors import Error, Stopped, UsageError
from microbatch.interrupts import watched
from microbatch.memory import budget, format_size, parse_size
from microbatch.optimizers import AdamW
from microbatch.outcome import Outcome, failure_of, outcome_of
from microbatch.planning import Plan, PlanReport
from microbatch.progress import Progress
from microbatch.schedule import interval
from microbatch.stream import Stream, is_stream
from microbatch.verification import check_first_batch


class Trainer:
    """Trains a model with the batch you state, in the memory you name, and keeps the run in a folder.

        outcome = mb.Trainer(model, dataset, loss, batch=256, memory="4GiB", lr=3e-4, run="runs/x", resume=True).train()

    model: any nn.Module. data: a map-style dataset, with __len__ and __getitem__, whose samples are drawn at random; or an
    iterable of samples, used in its own order, a batch in memory at a time. One with state_dict() and load_state_dict()
    is resumed by them, another one is read again up to where the run was; at its end it begins again. loss: `loss(model,
    micro)` returns the sum over the micro-batch and what it is averaged over; see mb.losses. batch: samples per step.

    run: the folder; metrics.jsonl, TensorBoard events, checkpoints, model.safetensors and report.html are written there.
    resume: continues a run that is there, with the same bits as if it had never stopped, and starts it otherwise.
    steps, samples, tokens, epochs: how long; give one, or one epoch is made. An iterable needs steps, samples or tokens.
    memory: the budget of all tensors on the model's device during train(); None: four fifths of what is free.
    micro_batch, recompute,
    batch_norm, clip_norm, generators: as for an Accumulator.
    lr, schedule, warmup, final_lr, decay: see Schedule; without lr, the optimizer's own. optimizer: mb.AdamW or another;
    None: mb.AdamW, without weight decay for vectors. guard: refuses spikes, and rolls a run that diverges back, at most
    `restores` times. noise_every: steps from one measure of the gradient's noise to the next. collate_fn: makes a list of
    samples into a micro-batch; torch's default_collate if None. lengths: of each sample, or a function of a sample; a
    batch is then taken by length, and with bound="tokens" micro-batches of shorter samples hold more of them. workers:
    processes that load samples ahead. held_out: a dataset whose loss is measured at the end. verify: checks the first
    samples by mb.verify(). progress: shows it on the terminal or in the notebook; without it, warnings are Python's.

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
        clip_norm: float | None = 1.0,
        micro_batch: int | str = "auto",
        recompute: Any = "auto",
        batch_norm: str = "auto",
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
        how: dict[str, Any] = {"lengths": lengths, "by_tokens": bound == "tokens", "workers": workers, "seed": seed}
        self.data: Data | Stream = (
            Stream(data, collate_fn, batch=batch, tokens_per_sample=tokens_per_sample, **how)
            if is_stream(data)
            else Data(data, collate_fn, tokens_per_sample=tokens_per_sample, **how)
        )
        self.held_out = None if held_out is None else Data(held_out, collate_fn, tokens_per_sample=tokens_per_sample)
        self.length = _length(steps, samples, tokens, epochs, None if is_stream(data) else self.data.size)
        self.optimizer = _default_optimizer(model, lr) if optimizer is None else optimizer
        self._memory = None if memory is None else parse_size(memory)
        clip_norm = math.inf if clip_norm is None else clip_norm
        self.accumulator = Accumulator(
            model,
            self.optimizer,
            loss,
            micro_batch=micro_batch,
            recompute=recompute,
            batch_norm=batch_norm,
            clip_norm=clip_norm,
            generators=generators,
        )
        self._micro_batch: Any = None if micro_batch == "auto" else micro_batch
        peak = lr if lr is not None else float(self.optimizer.param_groups[0]["lr"])
        schedule = schedule or "constant"
        self.schedule = self._schedule(schedule, peak, final_lr, warmup, decay)
        self._guard, self._restores, self._noise_every = guard, restores, noise_every
        self._checkpoint_every, self._keep, self._seed = interval(checkpoint_every), keep, seed
        self._verify, self._progress = verify, progress
        self.plan_report: PlanReport | None = None  #: of train()
        self._settings = {
            "model": type(model).__name__,
            "device": str(self.accumulator._device),
            "batch": batch,
            "optimizer": type(self.optimizer).__name__,
            "lr": peak,
            "schedule": schedule,
            "warmup": interval(warmup),
            "final-lr": final_lr,
            "length": self.length,
            "clip": clip_norm if math.isfinite(clip_norm) else "inf",
            "seed": seed,
            "data-samples": "stream" if is_stream(data) else self.data.size,
            "guard": guard,
            "loss": getattr(loss, "__qualname__", type(loss).__name__),
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
        settings = self._settings | {"data-crc32": self.data.fingerprint(), "memory": self._budget_text()}
        try:
            folder = _core.RunFolder(str(self.run), self.resume)
        except UsageError as error:
            raise UsageError(str(error).replace("--resume", "resume=True")) from None
        try:
            with contextlib.nullcontext() if self._memory is None else budget(self._memory, self.accumulator._device):
                return self._train_in(folder, settings, shown, on_step)
        finally:
            folder.close()  # whoever keeps the traceback does not keep the lock
            shown.close()
            self.data.close()

    def _train_in(
        self,
        folder: Any,
        settings: dict[str, Any],
        shown: Progress,
        on_step: Callable[[dict[str, Any]], None] | None,
    ) -> Outcome:
        if not self.model.training:
            self.model.train()
        if isinstance(self.data, Stream):
            self.data.note = shown.note
        told = list(folder.warnings)
        for warning in told:
            shown.on_note(f"warning: {warning}")
        recorded = self._take_up(folder, settings, shown) if folder.has_state else None
        for warning in folder.warnings:
            if warning not in told:
                shown.on_note(f"warning: {warning}")
        report = self._make_plan(recorded)
        folder.lock()
        if not folder.has_state and self._verify:
            self._check()
        shown.note(self._describe(folder))
        plan = self.accumulator.plan
        settings |= {"micro-batch": plan.micro_batch, "recompute": plan.recompute, "batch-norm": plan.batch_norm}
        how = self._run_settings(settings)
        run = _core.Run(folder, self.accumulator._native, self.data, self._loss_of_micro, report, how, shown)
        try:
            shown.begin(run.outcome, on_step)
            with watched(shown):
                run.train()
            shown.close()
            return self._conclude(run, settings)
        finally:
            made = run.outcome
            if made.progress.steps == 0 and not made.checkpointed and made.resumed_from is None:
                run.remove_unused()
            del made
            run.close()

    def _loss_of_micro(self, micro: Any) -> Any:
        return self.loss(self.model, self.accumulator._on_device(micro))

    def _schedule(self, shape: str, peak: float, floor: float, warmup: int | str, decay: int | str | None) -> Any:
        count, unit = _core.interval(self.length)

        def in_unit(value: int | str) -> str:
            return str(_core.convert(interval(value), unit, self.batch, self.data.tokens_per_sample))

        if decay is not None and shape != "wsd":
            raise UsageError(f"decay is for the schedule 'wsd', not for {shape!r}")
        if shape == "wsd":
            decay = f"{max(1, count // 5)} {unit}" if decay is None else in_unit(decay)
        return _core.Schedule(shape, peak, floor, in_unit(warmup), self.length, decay or "", 2.0)

    def _take_up(self, folder: Any, settings: dict[str, Any], shown: Progress) -> Plan | None:
        def note(said: str) -> None:
            if self._progress:
                shown.note(said)
            else:
                warnings.warn(said, stacklevel=6)

        return resume.take_up(folder, str(self.run), settings, note)

    def _budget_text(self) -> str:
        return "auto" if self._memory is None else format_size(self._memory)

    def _make_plan(self, recorded: Plan | None) -> Any:
        """Measures the plan, or the one that the run to resume has; returns the library's report."""
        micro_batch = self._micro_batch
        accumulator = self.accumulator
        if micro_batch is None and recorded is not None:
            micro_batch = recorded.micro_batch
            if accumulator._recompute == "auto":
                accumulator._recompute = "always" if recorded.recompute else "never"
            if accumulator._policy == "auto":
                accumulator._policy = recorded.batch_norm
        source: Any = Longest(self.data, self.batch)
        report = accumulator._measured_plan(source, self._loss_of_micro, micro_batch)
        self.plan_report = planning.report_of(report)
        accumulator.plan = self.plan_report.plan
        return report

    def _check(self) -> None:
        few = Examples(self.data, 8)
        if few.size < 2:
            return
        try:
            check_first_batch(self.accumulator._adapter, few, self._loss_of_micro, self.accumulator.plan.batch_norm)
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
            + (f"\nBatchNorm {self.plan_report.batch_norm}" if self.plan_report.batch_norm else "")
            + (f"\n{self.accumulator.replaced}" if self.accumulator.replaced else "")
        )

    def _run_settings(self, settings: dict[str, Any]) -> dict[str, Any]:
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
            "config": resume.config_of(settings),
            "notes": resume.notes_of(settings),
        }

    def _conclude(self, run: Any, settings: dict[str, Any]) -> Outcome:
        """Measures the held-out loss, writes the report, and raises what the end of the run calls for."""
        outcome = run.outcome
        if run.done and outcome.progress.steps > 0 and not outcome.diverged:
            if self.held_out is not None:
                outcome.held_out = self._held_out_loss()
            _core.judge_end(outcome, str(self.run))
        failure = failure_of(outcome)
        banner = failure or ("Interrupted before its end." if outcome.interrupted else "")
        if outcome.progress.steps > 0:
            shown = [(name, str(value)) for name, value in settings.items() if value is not None]
            _core.write_run_report(str(self.run), shown, banner, outcome.held_out)
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


def _check_settings(batch: Any, restores: Any, noise_every: Any, keep: Any, workers: Any, seed: Any) -> None:
    _require_count("batch", batch, 1)
    _require_count("keep", keep, 1)
    for name, value in (("restores", restores), ("noise_every", noise_every), ("workers", workers), ("seed", seed)):
        _require_count(name, value, 0)


def _require_count(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UsageError(f"{name} is {value!r}; it is a whole number, at least {least}")


def _length(steps: int | None, samples: int | None, tokens: int | None, epochs: int | None, size: int | None) -> str:
    lengths = {"steps": steps, "samples": samples, "tokens": tokens, "epochs": epochs}
    given = [(unit, count) for unit, count in lengths.items() if count is not None] or [("epochs", 1)]
    if size is None and given == [("epochs", given[0][1])]:
        raise UsageError("the data is an iterable, whose length is not known: give steps=, samples= or tokens=")
    if len(given) > 1:
        raise UsageError(f"give one of {', '.join(unit for unit, _ in given)}: each says how long the run is")
    unit, count = given[0]
    _require_count(unit, count, 1)
    return f"{count * (size or 1)} samples" if unit == "epochs" else f"{count} {unit}"


def _default_optimizer(model: nn.Module, lr: float | None) -> AdamW:
    trained = [one for one in model.parameters() if one.requires_grad]
    if not trained:
        raise UsageError("no parameter of the model requires a gradient")
    groups = [
        {"params": [one for one in trained if one.dim() >= 2], "weight_decay": 0.1},
        {"params": [one for one in trained if one.dim() < 2], "weight_decay": 0.0},
    ]
    return AdamW([group for group in groups if group["params"]], lr=1e-3 if lr is None else lr)
