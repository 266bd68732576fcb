"""Activation checkpointing of a module's blocks, switched on and off from step to step without a trace."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from microbatch.errors import UsageError


class Lever(Protocol):
    """Switches recompute for every forward from now on."""

    def switch(self, on: bool) -> None: ...


class Blocks:
    """Recomputes each of these modules in backward, by torch's checkpoint; buffers move once, in the forward pass."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        self.blocks = blocks

    def switch(self, on: bool) -> None:
        for block in self.blocks:
            wrapped = block.__dict__.get("forward")
            if on and not isinstance(wrapped, _Checkpointed):
                block.forward = _Checkpointed(block)
            elif not on and isinstance(wrapped, _Checkpointed):
                wrapped.undo()


class HuggingFace:
    """A `transformers` model's own switch, which knows what to do with its caches."""

    def __init__(self, model: Any) -> None:
        self.model = model
        # Its name since 5.20, and before.
        self.name = next(one for one in ("activation", "gradient") if hasattr(model, f"{one}_checkpointing_enable"))

    def switch(self, on: bool) -> None:
        if on:
            enable = getattr(self.model, f"{self.name}_checkpointing_enable")
            enable(**{f"{self.name}_checkpointing_kwargs": {"use_reentrant": False}})
        else:
            getattr(self.model, f"{self.name}_checkpointing_disable")()


def lever_of(module: nn.Module, recompute: Any) -> Lever | None:
    """The lever that `recompute` asks for: "auto" and "always" find one, "never" needs none, a class or a tuple of
    classes names the blocks. None if the module has no blocks to recompute.

    Raises UsageError if classes are named of which the module has none, or the word is another one.
    """
    if isinstance(recompute, str):
        if recompute not in ("auto", "never", "always"):
            raise UsageError(f"recompute is {recompute!r}; it is 'auto', 'never', 'always', or the class of the blocks")
        if recompute == "never":
            return None
        lever = _find(module)
        if lever is None and recompute == "always":
            raise UsageError(
                "recompute is 'always', and the model has no list of blocks (nn.ModuleList); name their class"
            )
        return lever
    classes = recompute if isinstance(recompute, tuple) else (recompute,)
    if not all(isinstance(one, type) and issubclass(one, nn.Module) for one in classes):
        raise UsageError(f"recompute is {recompute!r}; it is 'auto', 'never', 'always', or the class of the blocks")
    blocks = [one for one in module.modules() if isinstance(one, classes)]
    if not blocks:
        raise UsageError(f"recompute names {recompute!r}, and the model has no such module")
    return Blocks(blocks)


def _find(module: nn.Module) -> Lever | None:
    if getattr(module, "supports_gradient_checkpointing", False):
        # Where the user has switched it on, it stays on.
        return None if any(getattr(one, "gradient_checkpointing", False) for one in module.modules()) else HuggingFace(module)
    blocks = [block for blocks in _lists_of_blocks(module) for block in blocks]
    return Blocks(blocks) if blocks else None


def _lists_of_blocks(module: nn.Module) -> Iterator[list[nn.Module]]:
    """The outermost lists whose members are alike and made of other modules."""
    for child in module.children():
        members = list(child.children())
        alike = len(members) > 1 and len({type(one) for one in members}) == 1
        if isinstance(child, nn.ModuleList) and alike and any(True for _ in members[0].children()):
            yield members
        else:
            yield from _lists_of_blocks(child)


class _Checkpointed:
    """The forward of a block, recomputed in backward."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.before = block.__dict__.get("forward")  # somebody else's patch
        self.forward = block.forward
        functools.update_wrapper(self, self.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        return checkpoint(self.forward, *args, use_reentrant=False, context_fn=self._contexts, **kwargs)

    def undo(self) -> None:
        if self.before is None:
            del self.block.forward
        else:
            self.block.forward = self.before

    def _contexts(self) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
        return contextlib.nullcontext(), _keep_buffers(self.block)


@contextlib.contextmanager
def _keep_buffers(block: nn.Module) -> Iterator[None]:
    """Running statistics have moved in the forward pass already."""
    before = [(buffer, buffer.clone()) for buffer in block.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
