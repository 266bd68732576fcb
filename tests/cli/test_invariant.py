"""The invariant mode: the same bits for any micro-batch and any number of processes."""

import os
import signal
import time

import pytest

from conftest import HANG, weights_file
from rank_runs import LOST, has_ended, start_three

# With dropout: random numbers are a grain's own.
JOB = {"batch": 9, "invariant": True, "dropout": 0.1}


def same_run(one, other):
    return weights_file(one) == weights_file(other) and all(
        one.column(name) == other.column(name) for name in ("loss", "weight", "gradient_norm", "learning_rate"))


@pytest.mark.parametrize("grain", [1, 2])
def test_no_cut_and_no_number_of_processes_changes_a_bit(run, grain):
    alone = run.text("train", run="one", steps=6, micro_batch=1, grain=grain, **JOB).ok()
    assert "the grains of the invariant mode" in alone.stdout
    for size, micro_batch, sharded in ((1, 8, "no"), (2, 3, "yes"), (3, 8, "no"), (4, 1, "yes")):
        told = run.text("train", run=f"of-{size}-{micro_batch}", steps=6, processes=size, micro_batch=micro_batch,
                        grain=grain, shard_optimizer=sharded, **JOB).ok()
        assert same_run(told, alone)


def test_a_run_that_is_resumed_by_four_then_one_then_three_is_the_same(run):
    whole = run.text("train", run="whole", steps=9, micro_batch=2, schedule="constant", **JOB).ok()
    run.text("train", run="parts", steps=3, processes=4, micro_batch=2, schedule="constant", shard_optimizer="yes", **JOB).ok()
    for steps, size in ((6, 1), (9, 3)):
        told = run.in_folder("parts", ["train", "--run", "parts", "--resume", "--steps", steps, "--processes", size]).ok()
    assert same_run(told, whole)


@pytest.mark.parametrize("number, victim", [(signal.SIGKILL, 0), (signal.SIGKILL, 2)])
def test_a_run_whose_ranks_were_killed_goes_on_as_if_nothing_had_happened(run, number, victim):
    flags = {"invariant": True, "schedule": "constant"}
    process, ranks = start_three(run, **flags)
    os.kill(ranks[victim], number)
    began = time.monotonic()
    while not all(has_ended(ranks[one]) for one in ranks if one != victim):
        assert time.monotonic() - began < 10
        time.sleep(0.05)
    process.communicate(timeout=HANG)
    assert process.returncode == LOST
    steps = len((run.folder / "run" / "metrics.jsonl").read_bytes().splitlines()) + 5
    words = ["train", "--run", "run", "--resume", "--processes", 2, "--steps", steps]
    told = run.in_folder("run", words).ok()
    whole = run.text("train", run="whole", steps=steps, batch=12, micro_batch=2, **flags).ok()
    assert same_run(told, whole)


def test_batch_norm_that_moves_is_refused_by_name(run):
    run.images("train", norm="batch", batch=8, steps=1, invariant=True).refused(2, "invariant", "BatchNorm", "frozen")
    told = run.images("train", norm="batch", batch_norm="frozen", batch=8, steps=1, invariant=True).ok()
    assert "grains" in told.stdout


def test_a_grain_without_the_mode_is_refused(run):
    run.text("train", grain=2).refused(2, "--grain 2", "--invariant")
