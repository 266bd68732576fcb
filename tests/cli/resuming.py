"""Resumed runs: how to create them, and when two of them are the same."""

import re
import shutil

import pytest

from conftest import chosen_of, weights_file

# What may differ between a run and the same run, stopped and resumed.
TIMES = {"step_seconds", "update_seconds", "predicted_step_seconds", "peak_bytes", "predicted_peak_bytes"}
OFTEN = {"steps": 12, "checkpoint_every": "4 steps", "keep": 9, "micro_batch": 3, "noise_every": 3}
JOBS = {
    "gpt": ("text", {"dropout": 0.1}),
    "batch norm": ("images", {"norm": "batch", "optimizer": "sgd", "nesterov": True}),
    "batch schedule": ("text", {"batch": None, "batch_schedule": "4 at 0, 8 at 20 samples", "schedule": "wsd",
                                "warmup": "3 steps"}),
}


def at_once(run, kind, **flags):
    """Memory for the plan and the noise, not for copies beside it: a checkpoint is on the disk before the next step.

    Where there is more, a step goes on while a checkpoint is written, and the next ones wait for that.
    """
    left_out = ("steps", "samples", "checkpoint_every", "keep", "keep_every", "noise_every", "restores", "warmup", "schedule")
    flags = {name: value for name, value in flags.items() if name not in left_out}
    if flags.pop("batch_schedule", None):
        flags["batch"] = 2 * flags["micro_batch"]
    chosen = chosen_of(getattr(run, kind)("plan", json=True, **{"micro_batch": 8} | flags).ok().document)
    return f"{chosen['measured_peak_bytes'] + chosen['parts']['gradients'] + 4096}B"


def train(run, name, job="gpt", **flags):
    kind, own = JOBS[job]
    flags = OFTEN | own | flags
    return getattr(run, kind)("train", run=name, **{"memory": at_once(run, kind, **flags)} | flags)


@pytest.fixture(scope="module")
def whole(shared_run):
    """An uninterrupted run of 12 steps, with a checkpoint every 4."""
    result = train(shared_run, "whole").ok()
    assert [checkpoint.name[-2:] for checkpoint in checkpoints_of(result.folder)] == ["04", "08", "12"]
    assert result.metrics[3]["gradient_variance"] is not None
    return result


def checkpoints_of(folder):
    """The folders of a run's checkpoints, oldest first; without those that are still being written."""
    place = folder / "checkpoints"
    found = place.iterdir() if place.exists() else []
    return sorted(entry for entry in found if re.fullmatch(r"step-\d{8}(-\d+)?", entry.name))


def cut(source, target, after=8, log=10):
    """A copy of a run as a kill leaves it: checkpoints of up to so many steps, so many lines in the log, no results."""
    shutil.copytree(source, target)
    for checkpoint in checkpoints_of(target):
        if int(checkpoint.name.split("-")[1]) > after:
            shutil.rmtree(checkpoint)
    for name in ("model.safetensors", "report.html", "summary.json"):
        (target / name).unlink()
    lines = (target / "metrics.jsonl").read_text().splitlines(keepends=True)
    (target / "metrics.jsonl").write_text("".join(lines[:log]))
    return target


@pytest.fixture
def killed(run, whole):
    """The run of 12 steps, killed in its tenth, in the folder "run"."""
    return cut(whole.folder, run.folder / "run")


@pytest.fixture
def resume(run):
    return lambda *words, **options: run("train", "--run", "run", "--resume", *words, **options)


def told_of(result, json=False):
    """What is said of resuming: from where, and each note."""
    first, *lines = re.search(r"^resume    .*\n(?: {10}.*\n)*", result.stderr if json else result.stdout,
                              re.MULTILINE)[0].splitlines()
    return first[10:], [line.strip() for line in lines]


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def without_times(result):
    return [{name: value for name, value in line.items() if name not in TIMES} for line in result.metrics]


def assert_same(result, other):
    """Two runs are the same, bit for bit: log, weights, and the state from which a third would resume."""
    assert without_times(result) == without_times(other)
    assert weights_file(result) == weights_file(other)
    last, others = (checkpoints_of(each.folder)[-1] for each in (result, other))
    assert last.name == others.name
    files = {file.name for file in last.iterdir()}
    assert files == {file.name for file in others.iterdir()}
    for name in ("model", "optimizer", "rng"):
        if f"{name}.safetensors" in files or name != "optimizer":  # sgd without momentum has no tensors
            assert (last / f"{name}.safetensors").read_bytes() == (others / f"{name}.safetensors").read_bytes(), name


@pytest.fixture(scope="module")
def long_steps():
    """Steps of many micro-batches, between which a signal falls."""
    return {"batch": 64, "micro_batch": 3, "dropout": 0.1, "steps": 4, "noise_every": 1, "restores": 3}
