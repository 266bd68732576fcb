"""What the library needs to know of an nn.Module."""

import collections
import math
import random
import sys
import types
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from microbatch.recompute import Lever


class Adapter:
    """Parameters, buffers, training flags and generators of a module, for the C++ side."""

    def __init__(self, module: nn.Module, lever: Lever | None, generators: Iterable[torch.Generator] = ()) -> None:
        self.module = module
        self.lever = lever
        self.generators = tuple(generators)

    @property
    def offers_checkpointing(self) -> bool:
        return self.lever is not None

    def parameters(self) -> list[tuple[str, Tensor]]:
        return list(self.module.named_parameters())

    def buffers(self) -> list[tuple[str, Tensor]]:
        # Every time anew: a forward pass may put other tensors in their place.
        return [(name, buffer) for name, buffer in self.module.named_buffers() if buffer.layout == torch.strided]

    def training_flags(self) -> list[int]:
        return [int(module.training) for module in self.module.modules()]

    def set_training_flags(self, flags: list[int]) -> None:
        for module, flag in zip(self.module.modules(), flags, strict=False):
            module.training = bool(flag)

    def set_checkpointing(self, on: bool) -> None:
        if self.lever is not None:
            self.lever.switch(on)

    def generator_states(self) -> list[tuple[str, Tensor]]:
        states = [("python", _python_state())]
        numpy = sys.modules.get("numpy")
        if numpy is not None and (state := _numpy_state(numpy)) is not None:
            states.append(("numpy", state))
        states += [(f"torch/{i}", generator.get_state()) for i, generator in enumerate(self.generators)]
        return states

    def set_generator_states(self, states: list[tuple[str, Tensor]]) -> None:
        for name, state in states:
            if name == "python":
                _set_python_state(state)
            elif name == "numpy" and "numpy" in sys.modules:
                _set_numpy_state(sys.modules["numpy"], state)
            elif name.startswith("torch/"):
                number = int(name.removeprefix("torch/"))
                if number < len(self.generators):
                    self.generators[number].set_state(state)


def own_memory(module: nn.Module) -> None:
    """Moves CPU parameters and buffers, one at a time, to memory that is counted: they may be mapped from a file.

    Tensors that share memory with others stay where they are.
    """
    distinct = {id(one): one for one in [*module.parameters(), *module.buffers()]}.values()
    tensors = [one for one in distinct if one.device.type == "cpu" and one.layout == torch.strided and one.numel() > 0]
    owners = collections.Counter(one.untyped_storage().data_ptr() for one in tensors)
    with torch.no_grad():
        for tensor in tensors:
            if owners[tensor.untyped_storage().data_ptr()] == 1:
                tensor.data = tensor.data.clone(memory_format=torch.preserve_format)


# A float64 holds every 32-bit word exactly, and the normal deviate that both generators keep for the next call.


def _python_state() -> Tensor:
    version, words, deviate = random.getstate()
    return torch.tensor([version, *words, math.nan if deviate is None else deviate], dtype=torch.float64)


def _set_python_state(state: Tensor) -> None:
    version, *words, deviate = state.tolist()
    random.setstate((int(version), tuple(map(int, words)), None if math.isnan(deviate) else deviate))


def _numpy_state(numpy: types.ModuleType) -> Tensor | None:
    name, words, position, has_deviate, deviate = numpy.random.get_state()
    if name != "MT19937":  # somebody put another generator in its place
        return None
    return torch.tensor([*words.tolist(), position, has_deviate, deviate], dtype=torch.float64)


def _set_numpy_state(numpy: types.ModuleType, state: Tensor) -> None:
    *words, position, has_deviate, deviate = state.tolist()
    words = numpy.array(words).astype(numpy.uint32)
    numpy.random.set_state(("MT19937", words, int(position), int(has_deviate), deviate))
