"""Microbatch inside other people's training loops; each needs its package, which is imported on first use.

`microbatch.integrations.transformers` has Hugging Face's Trainer, and `microbatch.integrations.lightning` a strategy
for Lightning's Trainer.
"""

import importlib
from typing import Any

_MODULES = ("lightning", "transformers")

__all__ = ["lightning", "transformers"]  # noqa: F822: made by __getattr__


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {' and '.join(_MODULES)}")


def __dir__() -> list[str]:
    return [*globals(), *_MODULES]
