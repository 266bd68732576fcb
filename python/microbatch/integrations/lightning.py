"""A strategy for Lightning's Trainer: the exact gradient of the whole batch, within a memory budget.

    from microbatch.integrations.lightning import MicrobatchStrategy

    trainer = L.Trainer(strategy=MicrobatchStrategy(count_targets, memory="4GiB"), gradient_clip_val=1.0)
    trainer.fit(module, loader)              # whole batches

The LightningModule stays as it is. `count_targets(micro)` returns what the mean loss of training_step is averaged over.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from microbatch import batches
from microbatch import memory as _memory
from microbatch.accumulator import Accumulator, StepReport, _check_micro_batch
from microbatch.errors import UsageError
from microbatch.model import Adapter

try:
    from lightning.pytorch import LightningModule
    from lightning.pytorch.accelerators import CPUAccelerator
    from lightning.pytorch.strategies import SingleDeviceStrategy
    from lightning.pytorch.trainer.states import TrainerFn
    from torchmetrics import Metric
    from torchmetrics.utilities import dim_zero_sum
except ImportError as error:
    raise ImportError("microbatch.integrations.lightning needs the package lightning: pip install lightning") from error

__all__ = ["MicrobatchStrategy"]

STATE = "microbatch"  # its name in a checkpoint

_REDUCTIONS: dict[Any, str] = {torch.mean: "mean", torch.sum: "sum", sum: "sum", torch.max: "max", max: "max",
                               torch.min: "min", min: "min"}


class MicrobatchStrategy(SingleDeviceStrategy):
    """Runs training_step on micro-batches, and leaves the mean gradient of the batch to the optimizer.

        from microbatch.integrations.lightning import MicrobatchStrategy

        trainer = lightning.Trainer(strategy=MicrobatchStrategy(memory="4GiB"), max_steps=2, logger=False)
        trainer.fit(module, torch.utils.data.DataLoader(dataset, batch_size=8))

    weight: `weight(micro)` returns what training_step's mean loss is averaged over, such as the number of targets; None
    takes the number of samples. A check on the first batch refuses a weight that does not fit the loss.
    memory, micro_batch, recompute, trim_padding: as of mb.Accumulator. device: where to train, such as "cuda:0", with
    the accelerator for it in Trainer; Lightning moves the whole batch there. collate: for a DataLoader that delivers lists of
    samples (collate_fn=list); makes a micro-batch of some of them.

    Values that training_step logs are joined for the batch: means by weight, or by the batch_size that is given to
    log(); sums, minima and maxima as reduce_fx says. Clipping, schedules, callbacks and checkpoints are Lightning's. A
    checkpoint also holds the plan, so that a resumed run has the same bits.

    Raises UsageError for accumulate_grad_batches other than 1, manual optimization, an accelerator for another device,
    float16 with a scaler, an own backward(), or a training_step that returns more than a loss.
    """

    strategy_name = "microbatch"

    accumulator: Accumulator | None = None  #: from the first step on
    last_report: StepReport | None = None  #: of the last batch; its update is Lightning's, so `applied` is False

    def __init__(
        self,
        weight: Callable[[Any], float | Tensor] | None = None,
        *,
        memory: int | str | None = None,
        micro_batch: int | str = "auto",
        recompute: Any = "auto",
        collate: Callable[[list[Any]], Any] | None = None,
        trim_padding: str | None = None,
        device: torch.device | str = "cpu",
        **named: Any,
    ) -> None:
        if weight is not None and not callable(weight):
            raise UsageError(f"weight is a {type(weight).__name__}; it is a function of a micro-batch, or None")
        _check_micro_batch(micro_batch)
        if memory is not None:
            _memory.parse_size(memory)
        super().__init__(_device_named(device), **named)
        self.weight = weight
        self._how: dict[str, Any] = {"memory": memory, "micro_batch": micro_batch, "recompute": recompute}
        self._collate, self._trim_padding = collate, trim_padding
        self._gradients: list[tuple[Tensor, Tensor]] = []  # of the batch, until Lightning has cleared the last ones
        self._state: dict[str, Any] | None = None  # of the checkpoint, until there is an accumulator
        self._weight_is_checked = False
        _memory.install()

    def setup(self, trainer: Any) -> None:
        _check_accelerator(self.accelerator, self.root_device)
        if getattr(self.precision_plugin, "scaler", None) is not None:
            raise UsageError("float16 needs scaled gradients, which are not supported: set precision='bf16-mixed'")
        if trainer.state.fn == TrainerFn.FITTING:
            _check_module(self.lightning_module)
            _check_accumulation(trainer)
            self.accumulator, self._weight_is_checked = None, False
        super().setup(trainer)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Computes the mean gradient of the batch, which backward() puts into `.grad`; returns the mean loss."""
        module = self.lightning_module
        _check_accumulation(module.trainer)
        batch, *rest = args
        step = _Step(self, module, rest, kwargs)
        source = step.source_of(batch, self._collate, self._trim_padding)
        gatherer = self._accumulator_of(module)
        for one in module.parameters():
            one.grad = None  # of the last batch: Lightning clears it later
        if not self._weight_is_checked:
            self._check_weight(step, source)
        with step.watching():
            gatherer.gather(source, step.loss)
        self.last_report = gatherer.hand_over()
        parameters = [one for one in module.parameters() if one.grad is not None]
        self._gradients = [(one, one.grad) for one in parameters]
        for one in parameters:
            one.grad = None
        step.log(source.size)
        loss = torch.tensor(self.last_report.loss, device=self.root_device)
        return loss if self.last_report.weight > 0.0 else None

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Puts the gradient that training_step() computed into `.grad`, between Lightning's hooks."""
        self.pre_backward(closure_loss)
        closure_loss = self.precision_plugin.pre_backward(closure_loss, self.lightning_module)
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        self._gradients = []
        closure_loss = self.precision_plugin.post_backward(closure_loss, self.lightning_module)
        self.post_backward(closure_loss)
        return closure_loss

    def save_checkpoint(self, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        if self.accumulator is not None:
            checkpoint[STATE] = self.accumulator.state_dict()
        super().save_checkpoint(checkpoint, *args, **kwargs)

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        checkpoint = super().load_checkpoint(*args, **kwargs)
        self._state = checkpoint.get(STATE)
        return checkpoint

    def _accumulator_of(self, module: Any) -> Accumulator:
        # The optimizer is Lightning's to step: it is here so that a plan leaves room for its state.
        optimizer, now = self.optimizers[0], self.accumulator
        if now is None or now.model is not module or now.optimizer is not optimizer:
            now = self.accumulator = Accumulator(module, optimizer, **self._how)
            if self._state is not None and self._how["micro_batch"] == "auto":
                now.load_state_dict(self._state)
            self._state = None
        return now

    def _check_weight(self, step: "_Step", source: Any) -> None:
        """The losses of some samples, one by one and together, must agree as means over the weight."""
        for count in (8, 4, 2):
            with contextlib.suppress(torch.OutOfMemoryError):
                self._check_weight_of(step, source, min(count, source.size))
                return

    def _check_weight_of(self, step: "_Step", source: Any, count: int) -> None:
        if count < 2:
            return  # nothing to compare: the next batch will do
        with step.checking():
            together, again = [float(step.loss(None, source.fetch(0, count)[0])[0]) for _ in range(2)]
            single = sum(float(step.loss(None, source.fetch(i, i + 1)[0])[0]) for i in range(count))
        self._weight_is_checked = True
        # A loss that draws numbers cannot be compared. Sums in another order differ by some 1e-6, with 16 bits by 1e-2.
        tolerance = 1e-4 if self.precision_plugin.precision in ("32-true", "64-true") else 2e-2
        if together != again or abs(together - single) <= tolerance * max(abs(together), 1e-2):
            return
        what = "the number of samples, as there is no weight=" if self.weight is None else "what weight= returns"
        raise UsageError(
            f"the loss of training_step is not a mean over {what}: times that, it is {together:.6g} for the first "
            f"{count} samples together and {single:.6g} one by one; give weight=, a function that returns what the "
            "loss of a micro-batch is averaged over"
        )


class _Step:
    """One batch: training_step on its micro-batches, and what it logs."""

    def __init__(self, strategy: MicrobatchStrategy, module: Any, rest: list[Any], named: dict[str, Any]) -> None:
        self.strategy, self.module, self.rest, self.named = strategy, module, rest, named
        self.logged: dict[str, _Logged] = {}
        self.metrics = [(one, _state_of(one)) for one in module.modules() if isinstance(one, Metric)]
        self.samples = 0  # of the micro-batch that runs
        self.weight = 0.0

    def source_of(self, batch: Any, collate: Any, trim_padding: str | None) -> Any:
        source = batches.Structure(batch, None, trim_padding) if collate is None else batches.Samples(batch, collate)
        fetch = source.fetch

        def watched(begin: int, end: int) -> Any:
            if begin == 0:
                self.restart()
            self.samples = end - begin
            return fetch(begin, end)

        source.fetch = watched  # type: ignore[method-assign]
        return source

    def restart(self) -> None:
        """What an attempt before has logged and counted does not count: it ran out of memory, or was a measurement."""
        self.logged.clear()
        for metric, state in self.metrics:
            _restore(metric, state)

    def loss(self, _: Any, micro: Any) -> tuple[Tensor, float]:
        """The sum over the micro-batch, and what it is averaged over."""
        weight = self.strategy.weight
        self.weight = float(self.samples if weight is None else weight(micro))
        with self.strategy.precision_plugin.train_step_context():
            result = self.module.training_step(micro, *self.rest, **self.named)
        if isinstance(result, Mapping):
            others = [key for key in result if key != "loss"]
            if others:
                raise UsageError(
                    f"training_step returns {others[0]!r} beside the loss, which is not joined from micro-batches: log "
                    "it, or keep it in the module"
                )
            result = result["loss"]
        if result is None or self.weight == 0.0:
            return torch.zeros(()), 0.0
        return result * self.weight, self.weight

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Takes down what training_step logs."""
        self.module.__dict__["log"] = self._take_down
        try:
            yield
        finally:
            del self.module.__dict__["log"]

    @contextlib.contextmanager
    def checking(self) -> Iterator[None]:
        """Lets training_step run without a trace, and without dropout."""
        adapter = Adapter(self.module, None)
        states, of_torch, flags = adapter.generator_states(), torch.get_rng_state(), adapter.training_flags()
        self.module.eval()
        try:
            with torch.no_grad(), self.watching():
                yield
        finally:
            adapter.set_training_flags(flags)
            adapter.set_generator_states(states)
            torch.set_rng_state(of_torch)
            self.restart()

    def _take_down(self, name: str, value: Any, *args: Any, **named: Any) -> None:
        bound = _LOG.bind(self.module, name, value, *args, **named)
        options = {key: one for key, one in bound.arguments.items() if key not in ("self", "name", "value")}
        self.logged.setdefault(name, _Logged(name, options)).add(value, options.get("batch_size"), self.weight)

    def log(self, samples: int) -> None:
        """Logs once what the micro-batches have logged."""
        before = {id(metric): state for metric, state in self.metrics}
        for name, one in self.logged.items():
            metric, by_step = one.metric, one.options.get("on_step") is not False
            # What a metric returned for the last micro-batch is no value of the batch.
            if by_step and metric is not None and metric._forward_cache is not None:
                metric._forward_cache = _value_since(before[id(metric)], metric, name)
            options = one.options | {"batch_size": one.samples or samples}
            self.module.log(name, one.value(), **options)


_LOG = inspect.signature(LightningModule.log)


class _Logged:
    """One name that training_step logs, joined over micro-batches."""

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        self.options = options
        self.samples = 0  # by the batch_size that was given, 0 if none was
        self.metric: Any = None
        self.values: list[Tensor] = []
        self.weights: list[float] = []
        how = options.get("reduce_fx", "mean")
        self.reduction = _REDUCTIONS.get(how, how)
        if self.reduction not in ("mean", "sum", "max", "min"):
            raise UsageError(
                f"log({name!r}, reduce_fx={how!r}): micro-batches are joined by 'mean', 'sum', 'max' or 'min'"
            )

    def add(self, value: Any, samples: int | None, weight: float) -> None:
        if isinstance(value, Metric):  # joins by itself
            self.metric = value
            return
        self.samples += samples or 0
        self.values.append(torch.as_tensor(value).detach().double().reshape(()))
        self.weights.append(weight if samples is None else float(samples))

    def value(self) -> Any:
        if self.metric is not None:
            return self.metric
        device = next((one.device for one in self.values if one.device.type != "cpu"), torch.device("cpu"))
        values = torch.stack([one.to(device) for one in self.values])
        if self.reduction == "mean":
            weights = torch.tensor(self.weights, dtype=torch.float64, device=device)
            # A micro-batch without targets has a loss of 0/0, which counts for nothing.
            return (values[weights > 0] * weights[weights > 0]).sum().div(weights.sum()).float()
        return getattr(values, self.reduction)().float()


def _state_of(metric: Any) -> dict[str, Any]:
    values = {name: getattr(metric, name) for name in metric._defaults}
    copies = {name: one.clone() if isinstance(one, Tensor) else list(one) for name, one in values.items()}
    return copies | {"_update_count": metric._update_count, "_computed": metric._computed}


def _restore(metric: Any, state: dict[str, Any]) -> None:
    for name, one in state.items():
        setattr(metric, name, one.clone() if isinstance(one, Tensor) else list(one) if isinstance(one, list) else one)


def _value_since(before: dict[str, Any], metric: Any, name: str) -> Any:
    """What the metric says of the updates since a state of it."""
    now = _state_of(metric)
    try:
        for key, reduction in metric._reductions.items():
            if isinstance(now[key], list):
                setattr(metric, key, now[key][len(before[key]) :])
            elif reduction is dim_zero_sum:
                setattr(metric, key, now[key] - before[key])
            else:
                raise UsageError(
                    f"log({name!r}, ...): {type(metric).__name__} cannot tell one batch from those before: pass "
                    "on_step=False"
                )
        metric._update_count -= before["_update_count"]
        metric._computed = None
        return metric.compute()
    finally:
        _restore(metric, now)


def _device_named(device: torch.device | str) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError):
        raise UsageError(f"device is {device!r}; it is a device such as 'cpu' or 'cuda:0'") from None


def _check_accelerator(accelerator: Any, device: torch.device) -> None:
    """Raises UsageError unless the accelerator's devices are of the strategy's kind."""
    is_cpu = isinstance(accelerator, CPUAccelerator)
    kind = "cpu" if is_cpu else str(accelerator.get_parallel_devices([0])[0].type)
    if kind == device.type:
        return
    instead = f"accelerator={device.type!r}" if device.type in ("cpu", "cuda") else f"an accelerator for {device.type}"
    raise UsageError(
        f"the accelerator is a {type(accelerator).__name__}, and MicrobatchStrategy(device={str(device)!r}) trains on "
        f"another device: pass {instead} to Trainer, or device='{kind}{'' if is_cpu else ':0'}' to MicrobatchStrategy"
    )


def _check_module(module: Any) -> None:
    if not module.automatic_optimization:
        raise UsageError(
            "the module optimizes manually: call an mb.Accumulator in its training_step, and leave the strategy out"
        )
    if type(module).backward is not LightningModule.backward:
        raise UsageError("the module has a backward() of its own, which would not be called: leave it out")
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise UsageError("training_step takes dataloader_iter, and Microbatch needs the batch: let it take batch")


def _check_accumulation(trainer: Any) -> None:
    if trainer.accumulate_grad_batches != 1:
        raise UsageError(
            f"accumulate_grad_batches is {trainer.accumulate_grad_batches}: leave it out, and let the DataLoader "
            "deliver whole batches, which Microbatch cuts"
        )
