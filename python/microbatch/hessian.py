"""How sharply the loss curves at the model's parameters."""

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import nn

from microbatch import _core, batches
from microbatch.model import Adapter


@dataclasses.dataclass(frozen=True)
class Curvature:
    """The top of the Hessian's spectrum."""

    largest_eigenvalue: float  #: of the Hessian of the batch's mean loss
    residual: float  #: an upper bound of its error
    products: int  #: Hessian-vector products that it took
    converged: bool


def curvature(
    model: nn.Module,
    batch: Any,
    loss: Callable[[Any, Any], Any],
    *,
    micro_batch: int | None = None,
    length: int | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
    most_products: int = 40,
    tolerance: float = 1e-5,
    seed: int = 0,
) -> Curvature:
    """The largest eigenvalue of the Hessian of the batch's mean loss, by Lanczos, whatever the split.

        found = mb.curvature(model, batch, loss, micro_batch=2)
        print(found.largest_eigenvalue, "+-", found.residual)

    The model is in evaluation mode meanwhile. Its loss must be twice differentiable: a fused attention without a second
    derivative is not (`attn_implementation="eager"` for Hugging Face models). micro_batch: None takes the batch at once.
    tolerance: relative to the eigenvalue. Leaves parameters, gradients and training mode unchanged. Raises UsageError if
    the weight is 0 or a product is not finite.
    Cost: one product costs about three gradients; four copies of the parameters.
    """
    source = batches.source_of(batch, length, collate, None)
    adapter = Adapter(model, None)
    flags, cut = adapter.training_flags(), micro_batch or max(1, source.size)
    model.eval()
    try:
        found = _core.largest_curvature(
            adapter, source, lambda micro: loss(model, micro), cut, most_products, tolerance, seed
        )
    finally:
        adapter.set_training_flags(flags)
    return Curvature(found.largest_eigenvalue, found.residual, found.products, found.converged)
