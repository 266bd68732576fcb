"""Groups of torch.distributed, as the library takes them."""

import dataclasses
import warnings
from typing import Any

import torch
from torch import nn

from microbatch import _core
from microbatch.devices import device_of
from microbatch.errors import UsageError


def group_of(process_group: Any, model: nn.Module) -> Any:
    """The library's group, None for a single process. Raises UsageError for a model that sums its gradients by itself."""
    parallel = torch.nn.parallel
    if isinstance(model, parallel.DistributedDataParallel | parallel.DataParallel):
        raise UsageError(
            f"the model is wrapped in {type(model).__name__}, which sums gradients in every micro-batch: pass the model "
            "itself, and process_group=torch.distributed.group.WORLD"
        )
    if process_group is None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            size = torch.distributed.get_world_size()
            if size > 1:
                warnings.warn(
                    f"there are {size} processes, and this Accumulator trains in its own alone: to train as one, pass "
                    "process_group=torch.distributed.group.WORLD",
                    stacklevel=3,
                )
        return None
    if not isinstance(process_group, torch.distributed.ProcessGroup):
        raise UsageError(
            f"process_group is a {type(process_group).__name__}; it is a group of torch.distributed, such as "
            "torch.distributed.group.WORLD after init_process_group()"
        )
    if (device := device_of(model)).type != "cpu":
        raise UsageError(f"the model is on {device}: several processes train on the CPU, so far")
    return _core.Group(process_group.group_name)


def gathered_state(state: dict[str, Any], own: set[int], process_group: Any) -> dict[str, Any] | None:
    """An optimizer's state_dict() with the state of all ranks, on the first rank of the group; None on the others.

    own: the numbers of the parameters that this rank updates. Tensors go one at a time.
    """
    group = torch.distributed
    rank, size = group.get_rank(process_group), group.get_world_size(process_group)
    mine = {number: values for number, values in state["state"].items() if number in own}
    told: list[Any] = [None] * size
    group.all_gather_object(told, {number: _described(values) for number, values in mine.items()}, group=process_group)
    whole = dict(mine)
    first = group.get_global_rank(process_group, 0)
    for owner in range(1, size):
        for number, values in told[owner].items():
            whole[number] = dict(values)
            for name, kind in values.items():
                if not isinstance(kind, _Kind):
                    continue
                if rank == owner:
                    group.send(mine[number][name].contiguous(), first, group=process_group)
                elif rank == 0:
                    tensor = torch.empty(kind.size, dtype=kind.dtype)
                    group.recv(tensor, group.get_global_rank(process_group, owner), group=process_group)
                    whole[number][name] = tensor
    if rank > 0:
        return None
    return {**state, "state": whole}


@dataclasses.dataclass(frozen=True)
class _Kind:
    """Of a tensor that another rank has."""

    size: tuple[int, ...]
    dtype: torch.dtype


def _described(values: dict[str, Any]) -> dict[str, Any]:
    return {name: _Kind(tuple(one.shape), one.dtype) if isinstance(one, torch.Tensor) else one
            for name, one in values.items()}
