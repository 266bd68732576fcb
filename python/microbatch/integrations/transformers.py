"""Hugging Face's Trainer with the exact gradient of the whole batch, within a memory budget.

    from microbatch.integrations.transformers import Trainer

    trainer = Trainer(model, arguments, train_dataset=samples, data_collator=collator, memory="4GiB")
    trainer.train()

The batch is `per_device_train_batch_size` x `gradient_accumulation_steps` samples. Microbatch decides how it is cut.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from microbatch import batches, losses
from microbatch import memory as _memory
from microbatch.accumulator import Accumulator, LossFunction, StepReport, _check_micro_batch
from microbatch.errors import UsageError
from microbatch.model import Adapter
from microbatch.recompute import lever_of

try:
    import transformers
    from transformers.models.auto import modeling_auto
except ImportError as error:
    raise ImportError(
        "microbatch.integrations.transformers needs the package transformers: pip install 'transformers[torch]'"
    ) from error
if int(transformers.__version__.split(".")[0]) < 5:
    raise ImportError(
        "microbatch.integrations.transformers needs transformers 5, and this is "
        f"{transformers.__version__}: pip install 'transformers[torch]>=5.20'"
    )

__all__ = ["Seq2SeqTrainer", "Trainer", "loss_of"]

STATE_FILE = "microbatch.pt"

# In this order: a class that is listed twice has the loss of the first list.
_LOSSES: list[tuple[str, LossFunction]] = [
    ("SEQ_TO_SEQ_CAUSAL_LM", losses.seq2seq_lm),
    ("SPEECH_SEQ_2_SEQ", losses.seq2seq_lm),
    ("SEQUENCE_CLASSIFICATION", losses.sequence_classification),
    ("TOKEN_CLASSIFICATION", losses.token_classification),
    ("IMAGE_CLASSIFICATION", losses.image_classification),
    ("MASKED_LM", losses.masked_lm),
    ("CAUSAL_LM", losses.causal_lm),
]


class Trainer(transformers.Trainer):
    """transformers.Trainer whose update is that of the whole batch, however it is cut.

        from microbatch.integrations.transformers import Trainer

        arguments = transformers.TrainingArguments(folder, per_device_train_batch_size=8, max_steps=2, use_cpu=True)
        Trainer(model, arguments, train_dataset=dataset, memory="4GiB").train()

    The batch, the number of steps, callbacks, clipping, schedules, logs, evaluation and checkpoints are those of
    transformers.Trainer with the same arguments. Each micro-batch is collated by itself, from samples of similar
    length.

    memory, micro_batch, recompute: as of mb.Accumulator. loss: `loss(model, micro)` returns the sum over the
    micro-batch and what it is averaged over; None takes the one of mb.losses that fits the model's class, and compares
    it with the model's own loss before the first step. Evaluation uses the model's own loss, or compute_loss().

    Raises UsageError for a setting that it does not support, or a model whose loss it does not know; DoesNotFit in
    train() if no micro-batch fits, with the parameters of the last step.
    A checkpoint also holds the plan (microbatch.pt), so that a resumed run has the same bits.
    """

    data_collator: Any
    accumulator: Accumulator | None = None  #: from the first step on
    last_report: StepReport | None = None  #: of the last batch; its update is the Trainer's, so `applied` is False

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *more: Any,
        memory: int | str | None = None,
        micro_batch: int | str = "auto",
        recompute: Any = "auto",
        loss: LossFunction | None = None,
        **named: Any,
    ) -> None:
        args = transformers.TrainingArguments("tmp_trainer") if args is None else args
        _check_arguments(args)
        _check_micro_batch(micro_batch)
        if memory is not None:
            _memory.parse_size(memory)
        if recompute == "always" and _checkpoints(args):
            raise UsageError("activation_checkpointing=True recomputes already: leave it out, or recompute='always'")
        if loss is not None and not callable(loss):
            raise UsageError(f"loss is a {type(loss).__name__}; it is a function (model, micro) -> (sum, weight)")
        super().__init__(model, args, *more, **named)
        lever_of(self.model, recompute)  # refuses what the first step would
        self._how: dict[str, Any] = {"memory": memory, "micro_batch": micro_batch, "recompute": recompute}
        # A loss of the user's is checked on the first batch: a mean would train with gradients that are too small.
        self._how["verify"] = loss is not None and loss not in [known for _, known in _LOSSES]
        self._parts: list[Any] = []  # what the loader has delivered of the batch
        self._state: dict[str, Any] | None = None  # of the checkpoint, until there is an accumulator
        self._loss_is_checked = loss is not None
        self._loss = loss if loss is not None else self._own_loss()
        if loss is not None and args.label_smoothing_factor:
            raise UsageError(
                f"label_smoothing_factor is {args.label_smoothing_factor}, and loss= is given: smooth the labels there"
            )
        _memory.install()

    def _own_loss(self) -> LossFunction:
        if self.compute_loss_func is not None or type(self).compute_loss is not transformers.Trainer.compute_loss:
            name = "compute_loss" if self.compute_loss_func is None else "compute_loss_func"
            raise UsageError(
                f"{name} does not say what its loss is averaged over: give loss=, a function (model, micro) -> "
                f"(sum, weight); {name} is then for evaluation"
            )
        return loss_of(self.model)

    def get_train_dataloader(self) -> Any:
        """As of transformers.Trainer, except that the samples are collated when a micro-batch needs them."""
        collator, config = self.data_collator, self.accelerator.dataloader_config
        dispatch = config.dispatch_batches
        self.data_collator = _Uncollated
        config.dispatch_batches = False  # between processes, of which there is one
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator, config.dispatch_batches = collator, dispatch

    def _inner_training_loop(self, *args: Any, **named: Any) -> Any:
        self._parts.clear()
        self.accumulator = self._state = None
        return super()._inner_training_loop(*args, **named)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> None:
        return None  # counted when the micro-batches run

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Leaves the mean gradient of the batch in `.grad` when its last part has come.

        Returns the mean loss then, and 0 for the parts before.
        """
        self._parts.append(inputs)
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        batch = self._joined()
        self._parts.clear()
        gatherer = self._accumulator_of(model)
        if not self._loss_is_checked:
            self._check_loss(model, batch)
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        gatherer.collate = self.data_collator if isinstance(batch, list) else None
        gatherer.gather(batch)
        self.last_report = gatherer.hand_over()
        return torch.tensor(self.last_report.loss, device=self.args.device)

    def _joined(self) -> Any:
        """The samples of the batch, or the one collated batch that the user's get_train_dataloader() delivered.

        If a stream without a length ends within a batch, the rest joins the first batch of the next epoch.
        """
        if all(isinstance(part, _Uncollated) for part in self._parts):
            return [sample for part in self._parts for sample in part.samples]
        if len(self._parts) == 1:
            return self._parts[0]
        raise UsageError(
            "get_train_dataloader() delivers batches that are collated already, which cannot be joined to the batch of "
            f"{len(self._parts)}: let it deliver whole batches, with gradient_accumulation_steps=1"
        )

    def _accumulator_of(self, model: nn.Module) -> Accumulator:
        # The optimizer is the Trainer's to step: it is here so that a plan leaves room for its state.
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        now = self.accumulator
        if now is None or now.model is not model or now.optimizer is not optimizer:
            now = self.accumulator = Accumulator(model, optimizer, self._micro_loss, **self._how)
            if self._state is not None and self._how["micro_batch"] == "auto":
                now.load_state_dict(self._state)
            self._state = None
        return now

    def _micro_loss(self, model: nn.Module, micro: Any) -> tuple[Tensor, float | Tensor]:
        inputs = self._prepare_inputs(micro)
        with self.compute_loss_context_manager():
            if self.label_smoother is not None:
                return _smoothed(self._loss, self.label_smoother.epsilon, model, inputs)
            return self._loss(model, inputs)

    def _check_loss(self, model: nn.Module, batch: Any) -> None:
        """Compares the loss function that the class stands for with the model's own loss, on two samples."""
        try:
            self._check_loss_of(model, batch, 2)
        except torch.OutOfMemoryError:
            self._check_loss_of(model, batch, 1)

    def _check_loss_of(self, model: nn.Module, batch: Any, count: int) -> None:
        model.eval()  # dropout would differ
        with _generators_kept(model), torch.no_grad(), self.compute_loss_context_manager():
            is_list = isinstance(batch, list)
            some = self.data_collator(batch[:count]) if is_list else batches.Structure(batch).fetch(0, count)[0]
            inputs = self._prepare_inputs(some)
            outputs = model(**inputs)
            theirs = outputs.get("loss") if isinstance(outputs, Mapping) else outputs[0]
            if theirs is None:
                raise UsageError(f"{_name(model)} returns no loss: give the samples labels, or give loss=")
            total, weight = self._loss(model, inputs)
        if float(weight) == 0.0:
            return  # nothing to compare: the next batch will do
        ours = float(total) / float(weight)
        # Sums in another order differ by some 1e-6; 16-bit logits by their last bits.
        tolerance = 2e-2 if self.args.bf16 or theirs.dtype != torch.float32 else 1e-4
        if abs(ours - float(theirs)) > tolerance * max(abs(float(theirs)), 1e-2):
            raise UsageError(
                f"the own loss of {_name(model)} is {float(theirs):.6g} for the first samples, and that of "
                f"{_name(self._loss)}, which its class stands for, is {ours:.6g}: give loss=, a function that returns "
                "(sum, weight)"
            )
        self._loss_is_checked = True

    def floating_point_ops(self, inputs: Any) -> int:
        """As of transformers.Trainer, with the tokens of the samples, without padding."""
        return int(super().floating_point_ops(self._sizes(inputs)))

    def _track_num_input_tokens(self, inputs: Any) -> None:
        super()._track_num_input_tokens(self._sizes(inputs))

    def _sizes(self, inputs: Any) -> Any:
        """In place of a batch that is not collated: tensors with as many elements, and a mask with as many ones."""
        if not isinstance(inputs, _Uncollated):
            return inputs
        name = getattr(self.model, "main_input_name", "input_ids")
        samples = [one for one in inputs.samples if isinstance(one, Mapping)]
        if not samples or name not in samples[0]:
            return {}
        sizes = {name: torch.empty(sum(_elements(one[name]) for one in samples), device="meta")}
        if "attention_mask" in samples[0]:
            masks = [torch.as_tensor(one["attention_mask"]) for one in samples]
            sizes["attention_mask"] = torch.tensor([int(one.sum()) for one in masks])
        return sizes

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.accumulator is not None:
            torch.save(self.accumulator.state_dict(), os.path.join(output_dir, STATE_FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and os.path.isfile(path := os.path.join(checkpoint, STATE_FILE)):
            self._state = torch.load(path, weights_only=True)


class Seq2SeqTrainer(Trainer, transformers.Seq2SeqTrainer):
    """transformers.Seq2SeqTrainer, with the update of Trainer above."""


def loss_of(model: Any) -> LossFunction:
    """The loss of mb.losses that the model's class stands for, by transformers' lists of classes for each task.

    Raises UsageError if the class is in none of them.
    """
    if any(getattr(one, "is_prompt_learning", False) for one in getattr(model, "peft_config", {}).values()):
        raise UsageError(
            "prompt tuning adds tokens that have no labels: give loss=, a function (model, micro) -> (sum, weight)"
        )
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = [one.__name__ for one in type(inner).__mro__]
    for task, loss in _LOSSES:
        classes = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").values()
        if any(name in names for one in classes for name in ((one,) if isinstance(one, str) else one)):
            return loss
    raise UsageError(
        f"the loss of {type(inner).__name__} is not known: give loss=, a function (model, micro) -> (sum, weight) as "
        "those of mb.losses"
    )


class _Uncollated:
    """Samples as the loader delivers them: opaque, so that nobody on the way takes them for a batch of tensors."""

    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples

    def __contains__(self, name: str) -> bool:
        return False


def _check_arguments(args: Any) -> None:
    """Raises UsageError for what would be wrong, or not what the user asked for."""
    if args.deepspeed or args.fsdp or args.parallelism_config is not None:
        raise UsageError("DeepSpeed, FSDP and other sharded models are not supported: Microbatch trains in one process")
    if args.world_size > 1:
        raise UsageError(f"there are {args.world_size} processes, and Microbatch trains in one: use no launcher")
    if args.n_gpu > 1:
        raise UsageError(
            f"the model would be spread over {args.n_gpu} GPUs (DataParallel), and Microbatch trains on one: set "
            "CUDA_VISIBLE_DEVICES=0"
        )
    if args.fp16:
        raise UsageError("fp16 needs gradients that are scaled, which is not supported: set bf16=True, or neither")
    if args.auto_find_batch_size:
        raise UsageError(
            "auto_find_batch_size changes the batch when memory runs out: leave it out, Microbatch keeps the batch and "
            "makes the micro-batch smaller"
        )
    optimizer = str(getattr(args.optim, "value", args.optim))
    if optimizer in ("lomo", "adalomo") or optimizer.endswith("layerwise"):
        raise UsageError(f"optim={optimizer!r} steps during backward, before the gradient is whole: take another")
    if args.use_liger_kernel:
        raise UsageError("use_liger_kernel leaves the model without logits, and the loss needs them: leave it out")


def _checkpoints(args: Any) -> bool:
    # Its name before transformers 5.21.
    return bool(getattr(args, "activation_checkpointing", getattr(args, "gradient_checkpointing", False)))


def _smoothed(loss: LossFunction, smoothing: float, model: Any, micro: Any) -> tuple[Tensor, int | Tensor]:
    """The loss with part of the target spread evenly over all classes, as transformers.LabelSmoother does."""
    if loss is losses.seq2seq_lm:
        arguments, labels = losses._split(micro)
        if "decoder_input_ids" not in arguments and "decoder_inputs_embeds" not in arguments:
            arguments["decoder_input_ids"] = losses._shifted_right(model, labels)
        logits = model(**arguments).logits
    else:
        logits, labels = losses._logits_and_labels(model, micro)
    if loss is losses.causal_lm:
        logits, labels = logits[:, :-1], labels[:, 1:]
    if labels.is_floating_point():
        raise UsageError("label_smoothing_factor is for labels that are classes, and these are fractions: set it to 0")
    logits, labels = logits.reshape(-1, logits.shape[-1]).float(), labels.reshape(-1)
    total = functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    return total, losses.count_true(labels != losses.IGNORED)


@contextlib.contextmanager
def _generators_kept(model: nn.Module) -> Iterator[None]:
    """A collator that masks draws from them, and the check must leave no trace."""
    adapter = Adapter(model, None)
    states, of_torch = adapter.generator_states(), torch.get_rng_state()
    try:
        yield
    finally:
        adapter.set_generator_states(states)
        torch.set_rng_state(of_torch)


def _elements(value: Any) -> int:
    return int(value.numel()) if isinstance(value, Tensor) else len(value)


def _name(thing: Any) -> str:
    return str(getattr(thing, "__name__", type(thing).__name__))
