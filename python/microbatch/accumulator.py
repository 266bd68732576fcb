"""One optimizer step for a whole batch, however it is cut."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from microbatch import _core, batches, memory, planning
from microbatch.batch_norm import REPLACING, batch_norms, replace_batch_norm, require_policy
from microbatch.devices import OnDevice, check_devices, device_of
from microbatch.distributed import gathered_state, group_of
from microbatch.errors import UsageError
from microbatch.guard import SpikeGuard
from microbatch.model import Adapter, own_memory
from microbatch.optimizers import driver_of
from microbatch.planning import Plan, PlanReport
from microbatch.recompute import lever_of
from microbatch.verification import check_first_batch

_WHOLE = 2**62  # samples: no batch is larger

LossFunction = Callable[[Any, Any], tuple[Tensor, float | Tensor]]


@dataclasses.dataclass(frozen=True)
class StepReport:
    """What became of one batch."""

    loss: float  #: mean over the batch's weight, at the parameters before the step
    weight: float  #: samples or target tokens, as the loss function counts
    gradient_norm: float  #: of the batch's mean gradient, before clipping
    learning_rate: float
    micro_batches: int
    plan: Plan  #: how it was run in the end; micro_batch is 0 if the caller cut it
    peak_bytes: int  #: the most that CPU tensors took during it
    out_of_memory: int  #: how often it ran out of memory and was begun again
    applied: bool  #: False: the parameters are as they were
    diverged: bool  #: the guard says that refusing batches does not help
    reason: str  #: why it was not applied
    noise_batch: float | None  #: weight at which noise is as large as the gradient, of this batch alone; None: not measured


class Accumulator:
    """Makes the update of the whole batch, in the memory there is.

        accumulator = mb.Accumulator(model, optimizer, loss, memory="4GiB")
        report = accumulator.step(batch)
        print(report.loss, report.gradient_norm, report.plan)

    Where the micro-batches are your own:

        accumulator.begin()
        for micro in micro_batches:
            accumulator.add(*loss(model, micro))
        accumulator.finish()
        report = accumulator.apply()

    model: any nn.Module. optimizer: mb.AdamW, mb.SGD, any of torch.optim or alike; None if you step by yourself, with the
    gradients that gather() leaves. loss: `loss(model, micro)` returns the SUM over the micro-batch and what it is averaged
    over (samples or target tokens); see mb.losses.

    memory: the budget of all tensors on the model's device, such as "4GiB", from now on, until
    memory.set_budget(None, device); None leaves the budget as it is.
    micro_batch: samples per forward and backward; "auto" finds the fastest that fits, at the first step or in
    make_plan(). clip_norm: largest norm of the mean gradient that is applied, None for any. recompute: whether
    activations may be computed again in backward: "auto", "never", "always", or the class of the blocks.
    batch_norm: what BatchNorm layers do while a batch is cut. "exact": they normalise by the whole batch, forward and
    backward. "deferred": by the micro-batch, and their running statistics move once a step, by those of the batch.
    "frozen": by the running statistics, which stay. "naive": as torch. "group", "rms": see replace_batch_norm(). "auto":
    exact if it fits and takes at most twice the time of the batch at once, else deferred; the plan says which. With a
    given micro_batch, time does not count. Micro-batches that you add yourself cannot be exact.
    guard: a SpikeGuard. noise_every: steps from one measure of the gradient's noise to the next, 0 for none. verify:
    checks a few samples of the first batch by mb.verify(): an averaged loss is a UsageError, whatever else depends on the
    split is a warning.
    collate: batches are lists of samples, which this makes into a micro-batch, the longest first. bound: "samples", or
    "tokens": micro-batches of shorter samples hold more of them, as many tokens as the first one. trim_padding: the name
    of the mask by which trailing padding is cut off. generators: torch.Generators that the loss draws from, beside
    torch's default, Python's and NumPy's.
    process_group: the processes that train together, such as torch.distributed.group.WORLD: each makes an Accumulator of
    the same model and calls step() at the same time; all begin with the parameters and buffers of rank 0, and make the
    same update, that of the whole batch. Each rank passes its own part of the batch, of any size, also of no sample;
    with shared_batch=True, all pass the whole batch, and each takes its share. shard_optimizer: each rank keeps the
    optimizer's state of its share of the parameters, and gives the others what it updates (ZeRO-1); save the state that
    whole_optimizer_state() returns then. It is for optimizers that update every parameter by itself, as most do.

    grain: above 0, the update has the same bits for any micro_batch and any number of processes, each with as many threads:
    the batch is computed in grains of so many samples, which are summed without an order; random numbers of torch's
    default generators are a grain's own. micro_batch has no effect then. Refused with a UsageError: BatchNorm that moves,
    other generators, and operators that give other bits each time. Where each rank passes its own part, only the last one
    may not be a multiple of the grain. Take state_dict() along to go on with the same bits.

    Out of memory: a batch that runs out is undone (gradients, buffers, generators) and run again with half the
    micro-batch; the update has the same bits as with the smaller one from the start.
    Whatever step() raises before the update, the state is as before it; KeyboardInterrupt included.

    Raises UsageError for settings out of range, or an optimizer with parameters that the model does not have.
    Not to be pickled or copied; in a forked child, make a new one.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        loss: LossFunction | None = None,
        *,
        memory: int | str | None = None,
        micro_batch: int | str = "auto",
        clip_norm: float | None = math.inf,
        recompute: Any = "auto",
        batch_norm: str = "auto",
        guard: SpikeGuard | None = None,
        noise_every: int = 0,
        verify: bool = False,
        collate: Callable[[list[Any]], Any] | None = None,
        bound: str = "samples",
        trim_padding: str | None = None,
        generators: Sequence[torch.Generator] = (),
        process_group: Any = None,
        shared_batch: bool = False,
        shard_optimizer: bool = False,
        grain: int = 0,
        sum_in_product: bool = True,
    ) -> None:
        _check_micro_batch(micro_batch)
        if guard is not None and not isinstance(guard, SpikeGuard):
            raise UsageError(f"guard is a {type(guard).__name__}; give an mb.SpikeGuard()")
        if isinstance(noise_every, bool) or not isinstance(noise_every, int) or noise_every < 0:
            raise UsageError(f"noise_every is {noise_every!r}; it is a number of steps, 0 for never")
        if isinstance(grain, bool) or not isinstance(grain, int) or grain < 0:
            raise UsageError(f"grain is {grain!r}; it is a number of samples, 0 for none")
        if grain > 0 and bound == "tokens":
            raise UsageError('bound="tokens" with a grain: a grain is so many samples, however long')
        if shard_optimizer and optimizer is None:
            raise UsageError("shard_optimizer=True without an optimizer: there is no state to shard")
        if not isinstance(model, nn.Module):
            raise UsageError(f"the model is a {type(model).__name__}, not a torch.nn.Module")
        check_bound(bound, collate is not None, "collate")
        if collate is not None and not callable(collate):
            raise UsageError(f"collate is a {type(collate).__name__}; it is a function of a list of samples")
        if isinstance(generators, torch.Generator):
            generators = (generators,)
        clip_norm = math.inf if clip_norm is None else clip_norm
        require_policy(batch_norm, model)
        group = group_of(process_group, model)
        lever = lever_of(model, recompute)
        adapter = Adapter(model, lever, generators)
        driver = None if optimizer is None else driver_of(optimizer)
        self._known = {id(one) for one in model.parameters()}
        if driver is not None:
            _refuse_other_parameters(driver, self._known)
        self._device = device_of(model)
        _set_memory(model, memory, self._device)
        self._on_device = OnDevice(self._device)
        #: what batch_norm="group" or "rms" changed, once nothing is refused any more
        self.replaced = replace_batch_norm(model, batch_norm) if batch_norm in REPLACING else None
        self.model = model
        self.optimizer = optimizer
        self.loss = loss
        self.guard = guard
        self.noise_every = noise_every
        self.collate = collate
        self.bound = bound
        self.trim_padding = trim_padding
        self._adapter = adapter
        self._verify = verify
        self._recompute = recompute if recompute in ("never", "always") else "auto"
        self._process_group = process_group
        self._native: Any = _core.Accumulator(
            adapter, driver, float(clip_norm), sum_in_product, group, shared_batch, shard_optimizer, grain
        )
        self._policy = "naive" if self.replaced or not batch_norms(model) else batch_norm
        self._given = None if micro_batch == "auto" else micro_batch
        self._auto = self._given is None or self._policy == "auto"
        self._planned = 0  # samples of the largest batch that a plan was made for
        self._steps = 0
        self.last_plan: PlanReport | None = None  #: of the last make_plan()
        if self._given is not None or self._policy != "naive":
            # Until there is a plan; "auto" may turn out to be exact then.
            policy = "deferred" if self._policy == "auto" else self._policy
            start = Plan(self._given or _WHOLE, self._recompute == "always", policy)  # type: ignore[arg-type]
            self._native.plan = planning.native(start)

    @property
    def plan(self) -> Plan:
        """How batches are run. Setting it forgets what was learned from running out of memory; a plan that names no
        BatchNorm policy has the Accumulator's ("auto": deferred, unless a plan was made).
        """
        return planning.from_native(self._native.plan)

    @plan.setter
    def plan(self, plan: Plan) -> None:
        if plan.batch_norm == "naive" and self._policy != "naive":
            plan = dataclasses.replace(plan, batch_norm=self.plan.batch_norm)
        self._native.plan = planning.native(plan)
        self._auto = False

    def step(self, batch: Any, loss: LossFunction | None = None, *, length: int | None = None) -> StepReport:
        """Gathers the gradients of the whole batch and steps once, or says in the report why not.

        length: the number of samples, where the tensors of the batch differ along dimension 0.
        Raises DoesNotFit if no micro-batch fits, UsageError for a batch or a loss that cannot be used, and whatever the
        loss function raises; the state is then as before.
        """
        if self.optimizer is None:
            raise UsageError("this Accumulator has no optimizer: call gather(batch), then step with your own")
        source, function = self._prepared(batch, loss, length)
        memory.reset_peak(self._device)
        gate = None if self.guard is None else self.guard._gate
        report = self._native.step(source, function, self._measures_noise(), gate)
        self._steps += 1
        return self._report(report)

    def gather(self, batch: Any, loss: LossFunction | None = None, *, length: int | None = None) -> StepReport | None:
        """The gradients of the whole batch, and no update yet.

        Without an optimizer, the batch's mean gradient is in `.grad` afterwards, without a copy: step with any optimizer,
        and clear the gradients before the next batch. With one, call apply(), discard() or hand_over(); returns None.
        """
        source, function = self._prepared(batch, loss, length)
        memory.reset_peak(self._device)
        self._native.gather(source, function, self._measures_noise())
        self._steps += 1
        return self.hand_over() if self.optimizer is None else None

    def begin(self) -> None:
        """Opens a batch whose micro-batches you cut by yourself: `add()` each, then `finish()` and `apply()`."""
        memory.reset_peak(self._device)
        if self._policy == "auto" and self.plan.batch_norm == "exact":
            self._native.plan = planning.native(dataclasses.replace(self.plan, batch_norm="deferred"))
        self._native.begin(self._measures_noise())

    def add(self, loss_sum: Tensor, weight: float | Tensor) -> None:
        """Backward of one micro-batch's summed loss, now."""
        self._native.add(loss_sum, weight)

    def finish(self) -> StepReport | None:
        """Closes the batch that begin() opened. Without an optimizer, the mean gradient is in `.grad` afterwards."""
        self._native.finish()
        self._steps += 1
        return self.hand_over() if self.optimizer is None else None

    def apply(self) -> StepReport:
        """Divides by the weight, clips, steps and clears."""
        return self._report(self._native.apply())

    def discard(self, reason: str = "discarded") -> StepReport:
        """Drops what is gathered; parameters and buffers are as before the batch."""
        return self._report(self._native.discard(reason))

    def hand_over(self) -> StepReport:
        """Leaves the gathered batch's mean gradient in `.grad`, without a copy, for a step that is made elsewhere.

        A plan still leaves room for the optimizer's state. Clear the gradients before the next batch.
        """
        return self._report(self._native.hand_over())

    def make_plan(
        self, batch: Any, loss: LossFunction | None = None, *, memory: int | str | None = None, length: int | None = None
    ) -> PlanReport:
        """Finds the fastest plan for batches like this one within the budget, and takes it over.

        Tries a few micro-batches on the job itself, for about the time of three steps, and leaves no trace. memory: the
        budget, set as by memory.set_budget(); None plans for the one that is set, or four fifths of what is free. The
        batch should be the longest that there will be.
        Raises DoesNotFit if nothing fits, saying what is missing.
        """
        source, function = self._sourced(batch, loss, length)
        return self._make_plan(source, function, memory)

    def state_dict(self) -> dict[str, Any]:
        """The plan, and what was learned from running out of memory and from past steps: to go on with."""
        plan = self.plan
        return {
            "plan": dataclasses.asdict(plan),
            "caps": self._native.caps(),
            "ranges": self._native.ranges(),
            "steps": self._steps,
            "planned": self._planned,
            "auto": self._auto,
            "guard": None if self.guard is None else self.guard.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what state_dict() of an Accumulator of the same model returned. Raises BadData if it does not fit."""
        self._native.plan = planning.native(Plan(**state["plan"]))
        self._native.load_caps(state["caps"])
        self._native.load_ranges(state.get("ranges", {}))
        self._steps, self._planned, self._auto = state["steps"], state["planned"], state["auto"]
        if self.guard is not None and state["guard"] is not None:
            self.guard.load_state_dict(state["guard"])

    def whole_optimizer_state(self) -> dict[str, Any] | None:
        """The optimizer's `state_dict()`, with the parts that other ranks keep: on rank 0, and None on the others.

        All ranks, between two steps. Any number of processes goes on from it: each gives it to its optimizer's
        `load_state_dict()`, and keeps its part. Cost: rank 0 holds the whole state, as one process would.
        """
        if self.optimizer is None:
            raise UsageError("this Accumulator has no optimizer: there is no state to gather")
        state: dict[str, Any] = self.optimizer.state_dict()
        if self._process_group is None or torch.distributed.get_world_size(self._process_group) == 1:
            return state
        driver = driver_of(self.optimizer)
        if not driver.is_partial():
            return state if torch.distributed.get_rank(self._process_group) == 0 else None
        return gathered_state(state, driver.own_numbers(), self._process_group)

    def require_whole_update(self) -> None:
        """Raises LostRank if a rank was lost while the others took its part of a sharded update.

        The parameters may be a mixture of two steps then: go on from what was saved before.
        """
        self._native.require_whole_update()

    def __repr__(self) -> str:
        plan = "not planned yet" if self._auto and not self._planned else str(self.plan)
        return f"Accumulator({type(self.model).__name__}, {type(self.optimizer).__name__}, {plan})"

    def __reduce__(self) -> Any:
        raise TypeError("an Accumulator cannot be pickled or copied: save its state_dict() and make a new one")

    def __deepcopy__(self, memo: Any) -> Any:
        return self.__reduce__()

    def _sourced(self, batch: Any, loss: LossFunction | None, length: int | None) -> tuple[Any, Any]:
        function = loss or self.loss
        if function is None:
            raise UsageError("there is no loss function: give one to the Accumulator or to step()")
        by_tokens = self.bound == "tokens"
        source = batches.source_of(batch, length, self.collate, self.trim_padding, by_tokens)
        model, on_device = self.model, self._on_device
        return source, lambda micro: function(model, on_device(micro))

    def _prepared(self, batch: Any, loss: LossFunction | None, length: int | None) -> tuple[Any, Any]:
        try:
            return self._checked(batch, loss, length)
        except BaseException as error:
            self._native.abandon(f"{type(error).__name__}: {error}")  # other processes would wait for this one
            raise

    def _checked(self, batch: Any, loss: LossFunction | None, length: int | None) -> tuple[Any, Any]:
        self._follow_model()
        source, function = self._sourced(batch, loss, length)
        check_devices(self.model, source)
        self._refuse_new_parameters()
        if self._auto and source.size > self._planned:  # never for a part without samples
            self._make_plan(source, function, None)
        if self._verify:
            check_first_batch(self._adapter, source, function, self.plan.batch_norm)
            self._verify = False
        return source, function

    def _follow_model(self) -> None:
        """A model may be moved to a device after its Accumulator is made."""
        device = device_of(self.model)
        if device != self._device:
            self._device, self._on_device = device, OnDevice(device)

    def _refuse_new_parameters(self) -> None:
        for name, one in self.model.named_parameters():
            if id(one) not in self._known:
                raise UsageError(
                    f"the model has the parameter {name!r}, which it did not have when the Accumulator was made: make "
                    "optimizer and Accumulator after the model is changed"
                )

    def _make_plan(self, source: Any, function: Any, budget: int | str | None) -> PlanReport:
        before = None if budget is None else (memory.set_budget(budget, self._device),)
        try:
            report = planning.report_of(self._measured_plan(source, function))
        except BaseException:
            if before is not None:
                memory.put_back(*before, self._device)
            raise
        self._native.plan = planning.native(report.plan)
        self._planned = max(self._planned, source.size)
        self.last_plan = report
        return report

    def _measured_plan(self, source: Any, function: Any, micro_batch: int | None = None) -> Any:
        """The library's report on the ways to run this batch within the budget. micro_batch: considers no other."""
        options = _core.PlannerOptions()
        options.budget_bytes = planning.default_budget(self._device)
        options.recompute = getattr(_core.Recompute, self._recompute)
        given = micro_batch or self._given
        options.micro_batch = min(given, source.size) if isinstance(given, int) else None
        policy = None if self._policy == "auto" else planning.native_policy(self._policy)
        return self._native.plan_batch(source, function, options, policy, None)

    def _measured_noise(self, batch: Any) -> tuple[Any, Any]:
        """The noise of a batch, None if it was not split, and the report on it; nothing is updated."""
        source, function = self._sourced(batch, None, None)
        self._native.gather(source, function, True)
        report = self._native.discard("measured")
        return report.noise, report

    def _measures_noise(self) -> bool:
        return self.noise_every > 0 and self._steps % self.noise_every == 0

    def _report(self, report: Any) -> StepReport:
        noise = report.noise
        known = noise is not None and noise.variance > 0.0 and noise.squared_gradient > 0.0
        return StepReport(
            loss=report.loss,
            weight=report.weight,
            gradient_norm=report.gradient_norm,
            learning_rate=report.learning_rate,
            micro_batches=report.micro_batches,
            plan=planning.from_native(report.plan),
            peak_bytes=memory.peak(self._device),
            out_of_memory=report.out_of_memory,
            applied=report.applied,
            diverged=report.diverged,
            reason=report.reason,
            noise_batch=noise.variance / noise.squared_gradient if known else None,
        )


def _check_micro_batch(micro_batch: Any) -> None:
    if micro_batch == "auto" or (isinstance(micro_batch, int) and not isinstance(micro_batch, bool) and micro_batch > 0):
        return
    raise UsageError(f"micro_batch is {micro_batch!r}; it is a number of samples, at least 1, or 'auto'")


def _refuse_other_parameters(driver: Any, known: set[int]) -> None:
    for one in driver.parameters():
        if id(one) not in known:
            raise UsageError(
                f"the optimizer updates a parameter of shape {list(one.shape)} that the model does not have: make the "
                "optimizer after the model is changed"
            )


def check_bound(bound: Any, possible: bool, needs: str) -> None:
    """Raises UsageError for a bound that does not exist, or that needs lengths."""
    if bound not in ("samples", "tokens"):
        raise UsageError(f"bound is {bound!r}; it is 'samples' or 'tokens'")
    if bound == "tokens" and not possible:
        raise UsageError(f"bound='tokens' needs {needs}=: the lengths of the samples are not known otherwise")


def _set_memory(model: nn.Module, budget: int | str | None, device: torch.device) -> None:
    size = None if budget is None else memory.parse_size(budget)  # refused before anything is changed
    memory.install()
    own_memory(model)
    if size is not None:
        memory.set_budget(size, device)
