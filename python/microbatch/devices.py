"""The device of a model, and how its batches get there."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from microbatch import _core, batches
from microbatch.errors import UsageError


def device_of(module: nn.Module) -> torch.device:
    """The device of the first parameter; the CPU if there are none."""
    first = next(module.parameters(), None)
    return torch.device("cpu") if first is None else first.device


class OnDevice:
    """Copies a micro-batch from the CPU to a device while the device computes the previous one.

    A micro-batch that already has a tensor on a device is returned unchanged.
    """

    def __init__(self, device: torch.device) -> None:
        self._uploader = None if device.type == "cpu" else _core.Uploader(device)

    def __call__(self, micro: Any) -> Any:
        if self._uploader is None:
            return micro
        tensors = batches.tensors_in(micro)
        if any(one.device.type != "cpu" for one in tensors):
            return micro
        moved = iter(self._uploader.upload(tensors))
        return batches.map_tensors(micro, lambda one: next(moved))


def _devices(tensors: Iterable[Tensor]) -> list[torch.device]:
    return list(dict.fromkeys(one.device for one in tensors))


def check_devices(model: nn.Module, source: Any) -> None:
    """Raises UsageError, naming both devices, if no tensor of the batch is on the model's device or on the CPU."""
    if not isinstance(source, batches.Structure):
        return
    of_batch = _devices(batches.tensors_in(source.batch))
    first = next(model.parameters(), None)
    if first is None or not of_batch or first.device in of_batch:
        return
    of_model = _devices(model.parameters())
    # What is on the CPU is copied, a micro-batch at a time.
    if not set(of_batch) & {*of_model, torch.device("cpu")}:
        raise UsageError(f"the model is on {of_model[0]}, and the batch on {of_batch[0]}: move one to the other")
