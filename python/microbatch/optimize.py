"""The library's fused operators in Hugging Face models.

    print(mb.optimize(model))

Parameters, their names and everything that is saved stay as they are.
"""

import collections
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from microbatch import _core
from microbatch.errors import UsageError
from microbatch.patches import BASES, KINDS, Head, Patch, has_dropout, is_eager, is_plain, name_of, patch_of

IGNORED = -100


class Optimized:
    """What optimize() replaced in a model: `print()` lists it, undo() restores the model's own code.

    As a context manager, it undoes at the end of the with statement.
    """

    def __init__(self, model: nn.Module, patches: list[Patch]) -> None:
        self.model = model
        self._patches = patches
        counts = collections.Counter((type(one.patched).__name__, one.what) for one in patches)
        #: how many modules of a class run what
        self.replaced = {f"{name}: {what}": count for (name, what), count in counts.items()}

    def undo(self) -> None:
        """Restores the model's own code; a second call does nothing."""
        for patch in self._patches:
            patch.undo()
        self._patches = []

    def __enter__(self) -> "Optimized":
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __str__(self) -> str:
        lines = [f"{count} x {what}" for what, count in self.replaced.items()]
        if dropping := sum(patch.fuses_no_dropout and has_dropout(patch.patched) for patch in self._patches):
            lines.append(f"{dropping} of these have dropout: while training they run the model's own code, until it is 0")
        return "\n".join([f"{type(self.model).__name__}, optimized:", *lines])


def optimize(model: nn.Module) -> Optimized:
    """Replaces the forward of known Hugging Face modules by the library's fused operators; returns what undoes it.

        optimized = mb.optimize(model)
        print(optimized)                   # which modules run what
        optimized.undo()

    Known are the blocks of GPT-2, Llama, Mistral and Qwen2, attention of BERT and RoBERTa, and GELU by the tanh formula.
    `mb.losses.causal_lm` and `masked_lm` then compute the model's head for labels that count, and no logits that nobody
    sees. The gradient is the same up to rounding, 1e-6 of its norm. While training, decoders make a cache of keys and
    values only if the call asks for one with `use_cache`.

    A call that a fused operator does not support runs the model's own code: dropout while training, a cache of keys and
    values, masks other than padding at the end, output_attentions, hooks inside a block, types other than float32,
    autocast, devices other than the CPU, torch.compile. Activation checkpointing works with both.

    The model may be saved, copied and pickled; a copy is optimized, too. Optimizing twice changes nothing.
    Raises UsageError if there is no module that it knows.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"optimize: the model is a {type(model).__name__}, not a torch.nn.Module")
    patches = []
    for module in model.modules():
        kind = KINDS.get(name_of(module))
        if kind is None:
            continue
        there = patch_of(module)
        if there is None and kind.attribute not in module.__dict__:  # somebody else's patch stays in charge
            there = kind(module)
            object.__setattr__(module, kind.attribute, there)
        if there is not None:
            patches.append(there)
    if not patches:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in KINDS}))
        raise UsageError(f"optimize: {type(model).__name__} has no module that is known; known are {known}")
    return Optimized(model, patches)


def causal_lm_sum(model: Any, arguments: Mapping[str, Any], labels: Tensor) -> tuple[Tensor, int | Tensor] | None:
    """Summed cross-entropy of the next tokens and their number, if the model is optimized and supports it."""
    head = _head_of(model, arguments)
    if head is None:
        return None
    linear = model.lm_head
    if not (is_plain(linear, nn.Linear) and linear.bias is None and linear.weight.dtype == torch.float32):
        return None
    targets = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    hidden, targets, count = _counted(_hidden(model, head, arguments), targets)
    return _core.linear_cross_entropy_sum_at_once(hidden, linear.weight, targets, IGNORED), count


def masked_lm_sum(model: Any, arguments: Mapping[str, Any], labels: Tensor) -> tuple[Tensor, int | Tensor] | None:
    """Summed cross-entropy at the labels that count and their number, if the model is optimized and supports it."""
    head = _head_of(model, arguments)
    if head is None:
        return None
    hidden, targets, count = _counted(_hidden(model, head, arguments), labels)
    logits = model.cls(hidden).reshape(-1, model.config.vocab_size)
    return functional.cross_entropy(logits, targets.reshape(-1), ignore_index=IGNORED, reduction="sum"), count


def _head_of(model: Any, arguments: Mapping[str, Any]) -> str | None:
    """The name of the model's base, if the model is optimized and nothing observes its forward."""
    mark = getattr(model, "__dict__", {}).get("microbatch_head")
    if not isinstance(mark, Head) or not mark.patch_active or not is_eager() or not is_plain(model, *BASES):
        return None
    if {"logits_to_keep", "num_items_in_batch", "return_dict"} & set(arguments):
        return None
    return BASES[name_of(model)] if getattr(model.config, "return_dict", True) else None


def _hidden(model: Any, base: str, arguments: Mapping[str, Any]) -> Tensor:
    if base != "bert" and "position_ids" not in arguments:  # see _Base
        arguments = {"use_cache": False, **arguments}
    return getattr(model, base)(**arguments).last_hidden_state  # type: ignore[no-any-return]


def _counted(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, int | Tensor]:
    """Rows whose targets count, all of them if most do or they are on a device, and the number of those that count."""
    rows, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    counted = targets != IGNORED
    if targets.device.type != "cpu":
        return rows, targets, counted.sum()  # selecting rows would wait for the device
    count = int(counted.sum())
    if count > len(targets) * 7 // 8:
        return rows, targets, count
    chosen = counted.nonzero().squeeze(1)
    return rows.index_select(0, chosen), targets.index_select(0, chosen), count
