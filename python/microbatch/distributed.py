"""Groups of torch.distributed, as the library takes them."""

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


def gathered_state(own: dict[str, Any], process_group: Any) -> dict[str, Any] | None:
    """An optimizer's state_dict() with the state of all ranks, on the first rank of the group; None on the others."""
    if process_group is None:
        return own
    size = torch.distributed.get_world_size(process_group)
    is_first = torch.distributed.get_rank(process_group) == 0
    parts: list[Any] | None = [None] * size if is_first else None
    first = torch.distributed.get_global_rank(process_group, 0)
    torch.distributed.gather_object(own["state"], parts, dst=first, group=process_group)
    if parts is None:
        return None
    whole = dict(own)
    whole["state"] = {number: state for part in parts for number, state in part.items()}
    return whole
