"""Refuses steps that stand out before they are taken."""

from typing import Any

from microbatch import _core


class SpikeGuard:
    """Judges a batch by its loss and gradient norm before the update.

        accumulator = mb.Accumulator(model, optimizer, loss, guard=mb.SpikeGuard())
        report = accumulator.step(batch)
        if not report.applied:
            print("refused:", report.reason)

    A batch is refused if its loss or norm is not finite, or more than `sigmas` spreads above the median of the last
    `window` applied steps, compared by their logarithm. More than `most_refused` refusals in a row, or a steady climb of
    the losses, is divergence: the report says so, and the batch is not applied.
    """

    def __init__(self, window: int = 128, *, least: int = 64, sigmas: float = 6.0, most_refused: int = 9) -> None:
        self._gate: Any = _core.SpikeGate(window, least, sigmas, most_refused)

    def state_dict(self) -> dict[str, Any]:
        """The losses and norms of the last applied steps, and the bounds that follow from them."""
        return dict(self._gate.state())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what state_dict() returned. Raises BadData if it is not the state of a guard."""
        self._gate.load_state(state)
