"""Losses as the library wants them: the SUM over a micro-batch, and what it is averaged over.

    accumulator = mb.Accumulator(model, optimizer, mb.losses.causal_lm)
    accumulator.step(batch)              # a mapping with input_ids, labels and what else the model takes

Those for Hugging Face models compute sum and count themselves, from the logits, whatever the model's own `loss` divides
by. Each takes (model, micro), where micro is a mapping of the model's arguments with `labels`, and returns (sum, weight).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from microbatch.errors import UsageError
from microbatch.optimize import causal_lm_sum, masked_lm_sum

__all__ = [
    "causal_lm",
    "from_mean",
    "image_classification",
    "masked_lm",
    "seq2seq_lm",
    "sequence_classification",
    "token_classification",
]

LossFunction = Callable[[Any, Any], tuple[Tensor, float | Tensor]]
IGNORED = -100


def causal_lm(model: Any, micro: Mapping[str, Any]) -> tuple[Tensor, int | Tensor]:
    """Next-token cross-entropy of a decoder, summed over the labels that count (not -100); labels are not shifted yet.

    The weight is the number of those labels, the first of each sample left out: nothing predicts it.
    """
    arguments, labels = _split(micro)
    found = causal_lm_sum(model, arguments, labels)
    if found is not None:
        return found
    # The labels are shifted, not the logits: those would be copied.
    return _cross_entropy(model(**arguments).logits, functional.pad(labels[:, 1:], (0, 1), value=IGNORED))


def masked_lm(model: Any, micro: Mapping[str, Any]) -> tuple[Tensor, int | Tensor]:
    """Cross-entropy of an encoder at the labels that are not -100; the weight is their number."""
    arguments, labels = _split(micro)
    found = masked_lm_sum(model, arguments, labels)
    return _cross_entropy(model(**arguments).logits, labels) if found is None else found


def seq2seq_lm(model: Any, micro: Mapping[str, Any]) -> tuple[Tensor, int | Tensor]:
    """Cross-entropy of an encoder-decoder at the labels that are not -100; the weight is their number.

    The decoder's inputs are made from the labels by the model, as in its own forward, unless they are given.
    """
    arguments, labels = _split(micro)
    if "decoder_input_ids" not in arguments and "decoder_inputs_embeds" not in arguments:
        arguments["decoder_input_ids"] = _shifted_right(model, labels)
    return _cross_entropy(model(**arguments).logits, labels)


def sequence_classification(model: Any, micro: Mapping[str, Any]) -> tuple[Tensor, int | Tensor]:
    """Loss of a label for each sample; the weight is the number of samples.

    As `transformers` decides: squared error for one output or `problem_type` "regression", binary cross-entropy for
    "multi_label_classification" or labels that are fractions, otherwise cross-entropy.
    """
    logits, labels = _logits_and_labels(model, micro)
    kind = getattr(getattr(model, "config", None), "problem_type", None)
    if kind == "regression" or (kind is None and logits.shape[-1] == 1):
        errors = (logits.reshape(labels.shape).float() - labels.float()).square()
        return errors.sum() / max(1, errors[0].numel() if len(errors) else 1), len(labels)
    if kind == "multi_label_classification" or labels.is_floating_point():
        sums = functional.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="sum")
        return sums / logits.shape[-1], len(labels)
    return _cross_entropy(logits, labels)


def token_classification(model: Any, micro: Mapping[str, Any]) -> tuple[Tensor, int | Tensor]:
    """Cross-entropy of a label for each token, at the labels that are not -100; the weight is their number."""
    return _cross_entropy(*_logits_and_labels(model, micro))


def image_classification(model: Any, micro: Any) -> tuple[Tensor, int | Tensor]:
    """Cross-entropy of a label for each image; the weight is the number of images.

    micro: a mapping with `pixel_values` and `labels` for a Hugging Face model, or a pair (images, labels) for any model
    that returns logits.
    """
    if isinstance(micro, Mapping):
        return _cross_entropy(*_logits_and_labels(model, micro))
    images, labels = micro
    return _cross_entropy(model(images), labels)


def from_mean(loss: Callable[[Any, Any], Tensor], weight: Callable[[Any], float | Tensor]) -> LossFunction:
    """A loss function from one that returns a mean: `loss(model, micro)` is the mean over `weight(micro)`.

        loss = mb.losses.from_mean(lambda model, micro: model(**micro).loss,
                                   weight=lambda micro: (micro["labels"][:, 1:] != -100).sum())
        accumulator = mb.Accumulator(model, optimizer, loss)

    A micro-batch of weight 0 counts for nothing: its loss, 0/0, is ignored. A weight on a device is therefore read, and
    every micro-batch waits for the device; write a loss function that returns the sum to avoid that.
    """

    def summed(model: Any, micro: Any) -> tuple[Tensor, float]:
        count = float(weight(micro))
        mean = loss(model, micro)
        if not isinstance(mean, Tensor):
            raise TypeError(f"from_mean: the loss function returned a {type(mean).__name__}, not a tensor")
        return (mean * count if count > 0.0 else torch.zeros(())), count

    return summed


def _split(micro: Any) -> tuple[dict[str, Any], Tensor]:
    if not isinstance(micro, Mapping) or not isinstance(micro.get("labels"), Tensor):
        found = f"the fields {', '.join(map(str, micro))}" if isinstance(micro, Mapping) else f"a {type(micro).__name__}"
        raise UsageError(f"this loss needs a mapping with the tensor 'labels'; the micro-batch is {found}")
    arguments = dict(micro)
    return arguments, arguments.pop("labels")


def _logits_and_labels(model: Any, micro: Any) -> tuple[Tensor, Tensor]:
    arguments, labels = _split(micro)
    return model(**arguments).logits, labels


def _cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, int | Tensor]:
    # As `transformers` does: logits of 16 bits are summed in 32.
    logits = logits.reshape(-1, logits.shape[-1])
    labels = labels.reshape(-1).to(logits.device)
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum"), count_true(labels != IGNORED)


def count_true(mask: Tensor) -> int | Tensor:
    """The number of true elements: an int on the CPU; on a device a tensor, so that nothing waits for it."""
    count = mask.sum()
    return int(count) if count.device.type == "cpu" else count


def _shifted_right(model: Any, labels: Tensor) -> Tensor:
    for name in ("prepare_decoder_input_ids_from_labels", "_shift_right"):
        if hasattr(model, name):
            shifted: Tensor = getattr(model, name)(labels)
            return shifted
    config = getattr(model, "config", None)
    start, padding = getattr(config, "decoder_start_token_id", None), getattr(config, "pad_token_id", None)
    if start is None or padding is None:
        raise UsageError(
            "the model does not say how the decoder's inputs are made from the labels: give decoder_input_ids in the batch"
        )
    shifted = labels.new_full(labels.shape, start)
    shifted[:, 1:] = labels[:, :-1]
    return shifted.masked_fill(shifted == IGNORED, padding)
