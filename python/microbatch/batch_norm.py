"""What BatchNorm layers do while a batch is cut."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from microbatch.errors import UsageError

POLICIES = ("auto", "exact", "deferred", "frozen", "naive", "group", "rms")
REPLACING = ("group", "rms")


class ChannelRMSNorm(nn.Module):
    """RMS norm over the channels (dimension 1), with the affine weights of a BatchNorm.

        mb.ChannelRMSNorm(16)(torch.randn(2, 16, 8, 8))

    Formula: y = x / sqrt(mean(x^2) + eps) * weight + bias, the mean over the channels of each position.
    Source: Zhang & Sennrich 2019, arXiv:1910.07467. Shapes: [samples, channels, ...] -> the same.
    """

    def __init__(self, channels: int, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__()
        self.channels, self.eps = channels, eps
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        y = x * (x.square().mean(1, keepdim=True) + self.eps).rsqrt()
        if self.weight is None or self.bias is None:
            return y
        shape = (-1, *(1 for _ in range(x.dim() - 2)))
        return y * self.weight.view(shape) + self.bias.view(shape)

    def extra_repr(self) -> str:
        return f"{self.channels}, eps={self.eps}, affine={self.weight is not None}"


@dataclasses.dataclass(frozen=True)
class Replaced:
    """What replace_batch_norm() changed: `print(replaced)` says it."""

    layers: tuple[str, ...]  #: names of the modules
    kind: str  #: what they are now

    def __str__(self) -> str:
        names = ", ".join(self.layers[:3]) + (f" and {len(self.layers) - 3} more" if len(self.layers) > 3 else "")
        count = "1 BatchNorm layer is" if len(self.layers) == 1 else f"{len(self.layers)} BatchNorm layers are"
        return f"{count} now {self.kind}, with the same affine weights: {names}"


def batch_norms(model: nn.Module) -> list[str]:
    """The names of the model's BatchNorm layers."""
    return [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]


def replace_batch_norm(model: nn.Module, kind: str) -> Replaced:
    """Replaces every BatchNorm by a norm that does not depend on the batch, on the spot; affine weights stay as they are.

        model = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.BatchNorm2d(8))
        print(mb.replace_batch_norm(model, "group"))

    kind: "group" is GroupNorm (Wu & He 2018, arXiv:1803.08494), with up to 32 groups of at least two channels; "rms" is
    ChannelRMSNorm. The parameters are the same objects, so an optimizer that has them keeps them. Running statistics are
    gone: a state_dict() saved from now on is loaded by a model that is changed in the same way. Outputs change.
    Raises UsageError if the model has no BatchNorm, or is one itself.
    """
    if kind not in REPLACING:
        raise UsageError(f"kind is {kind!r}; it is 'group' or 'rms'")
    names = batch_norms(model)
    if not names:
        raise UsageError("the model has no BatchNorm layer to replace")
    if "" in names:
        raise UsageError("the model is a BatchNorm layer itself: put it into a module to replace it")
    made: dict[int, nn.Module] = {}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, _BatchNorm):
                made.setdefault(id(child), _replacement(child, kind))
                setattr(parent, name, made[id(child)])
    return Replaced(tuple(names), "GroupNorm" if kind == "group" else "RMSNorm over the channels")


def require_policy(policy: Any, model: nn.Module) -> None:
    """Raises UsageError for an unknown policy, or for one that needs BatchNorm layers if the model has none."""
    if policy not in POLICIES:
        raise UsageError(f"batch_norm is {policy!r}; it is {', '.join(map(repr, POLICIES[:-1]))} or {POLICIES[-1]!r}")
    if policy not in ("auto", "naive") and not batch_norms(model):
        raise UsageError(f"batch_norm is {policy!r}, but the model has no BatchNorm layer: leave it out")


def _replacement(norm: _BatchNorm, kind: str) -> nn.Module:
    channels = norm.num_features
    new: nn.GroupNorm | ChannelRMSNorm
    if kind == "group":
        new = nn.GroupNorm(_groups_of(channels), channels, norm.eps, norm.affine)
    else:
        new = ChannelRMSNorm(channels, norm.eps, norm.affine)
    if norm.affine:
        new.weight, new.bias = norm.weight, norm.bias
    new.train(norm.training)
    return new


def _groups_of(channels: int) -> int:
    return next((groups for groups in (32, 16, 8, 4, 2) if channels % groups == 0 and channels // groups >= 2), 1)
