"""What a run remembers of how it was started, compared with how it is resumed."""

import json
from collections.abc import Callable
from typing import Any

from microbatch.errors import Error, UsageError
from microbatch.planning import Plan

FIXED = ("model", "batch", "optimizer", "seed", "data-samples")  # with another one of these it is another run
NOT_SETTINGS = {"memory", "device", "loss", "data-crc32"}  # no reason to leave the newest checkpoint
NOTE = "python"  # in a checkpoint


def notes_of(settings: dict[str, Any]) -> dict[str, str]:
    """What a checkpoint keeps of the settings."""
    return {NOTE: json.dumps(settings)}


def config_of(settings: dict[str, Any]) -> str:
    """config.toml, for people."""
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items() if value is not None)


def take_up(folder: Any, run: str, now: dict[str, Any], note: Callable[[str], None]) -> Plan | None:
    """Compares the run in the folder with the settings of now, and returns its plan if the budget is still the same.

    note: is told what has changed. A run that diverged goes on from its newest healthy checkpoint if something has.
    Raises UsageError if it is another run.
    """
    before = _recorded_in(folder)
    changed = {name: (before[name], now[name]) for name in now if name in before and before[name] != now[name]}
    if None in changed.get("data-crc32", ()):
        del changed["data-crc32"]  # not known
    fixed = [name for name in FIXED if name in changed]
    if fixed:
        said = "; ".join(f"{name} was {changed[name][0]}, is {changed[name][1]}" for name in fixed)
        raise UsageError(f"the run in {run} is another one: {said}; restore these, or name another folder")
    if changed.keys() - NOT_SETTINGS and not folder.is_healthy():
        folder.use_healthy()  # this is the way out of a divergence
    same_budget = "memory" not in changed
    if not same_budget:
        folder.forget_caps()
    for name, (was, is_now) in changed.items():
        if name == "data-crc32":
            note("resume: the samples of the data are not those with which the run was started")
        else:
            note(f"resume: {name} was {was}, is {is_now}")
    if not same_budget:
        return None
    return Plan(before["micro-batch"], before["recompute"], before.get("batch-norm", "naive"))


def _recorded_in(folder: Any) -> dict[str, Any]:
    try:
        found = json.loads(folder.note(NOTE))
    except Error:
        raise UsageError("the run in the folder was not started from Python: resume it with the command") from None
    return dict(found)
