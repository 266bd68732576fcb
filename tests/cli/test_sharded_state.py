"""The optimizer's state sharded over processes: --shard-optimizer."""

import os
import signal
import time

import pytest

from conftest import HANG
from rank_runs import LOST, RUN, close, has_ended, start_three

ADAM = {"batch": 7, "micro_batch": 2, "optimizer": "adamw", "schedule": "constant"}


def parts(told, step):
    folder = told.folder / "checkpoints" / f"step-{step:08}"
    return sorted(path.name for path in folder.glob("optimizer*"))


def test_sharded_state_makes_the_run_of_one_process(run):
    alone = run.text("train", run="one", steps=4, **RUN).ok()
    for size in (2, 3):
        told = run.text("train", run=f"of-{size}", steps=4, processes=size, shard_optimizer="yes", **RUN).ok()
        # fp32 sums of a few hundred terms in another order.
        assert close(told.column("loss"), alone.column("loss"), 1e-6)
        assert close(told.column("gradient_norm"), alone.column("gradient_norm"), 1e-5)
        assert "sharded   each process keeps its share" in told.stdout
        assert told.files == alone.files


def test_sharded_state_is_resumed_by_any_number_of_processes(run):
    whole = run.text("train", run="whole", steps=10, **ADAM).ok()
    run.text("train", run="parts", steps=2, processes=3, shard_optimizer="yes", **ADAM).ok()
    for steps, size, how in ((4, 1, "yes"), (6, 4, "yes"), (8, 2, "no"), (10, 2, "yes")):
        words = ["train", "--run", "parts", "--resume", "--steps", steps, "--processes", size, "--shard-optimizer", how]
        told = run.in_folder("parts", words).ok()
        count = size if how == "yes" else 1
        assert parts(told, steps) == ["optimizer%s.safetensors" % (f".{i}" if i else "") for i in
                                      sorted(range(count), key=lambda i: f".{i}" if i else ".s")]
    # AdamW scales up the rounding of gradients near 0.
    assert close(told.column("loss"), whole.column("loss"), 1e-4)


@pytest.mark.parametrize("number, victim", [(signal.SIGKILL, 1), (signal.SIGKILL, 0), (signal.SIGSTOP, 2)])
def test_the_others_end_and_the_last_checkpoint_is_the_way_on(run, number, victim):
    process, ranks = start_three(run, shard_optimizer="yes")
    began = time.monotonic()
    os.kill(ranks[victim], number)
    while not all(has_ended(ranks[one]) for one in ranks if one != victim):
        assert time.monotonic() - began < 10
        time.sleep(0.05)
    errors = process.communicate(timeout=HANG)[1]
    assert process.returncode == LOST
    assert f"rank {victim} " in errors, errors
    steps = len((run.folder / "run" / "metrics.jsonl").read_bytes().splitlines()) + 5
    words = ["train", "--run", "run", "--resume", "--processes", 2, "--steps", steps]
    assert run.in_folder("run", words).ok().column("step") == list(range(1, steps + 1))


def test_an_interrupt_ends_all_with_a_whole_checkpoint(run):
    process, ranks = start_three(run, shard_optimizer="yes")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=HANG)
    assert process.returncode == 130
    steps = len((run.folder / "run" / "metrics.jsonl").read_bytes().splitlines())
    assert (run.folder / "run" / "checkpoints" / f"step-{steps:08}" / "optimizer.2.safetensors").is_file()
    assert all(has_ended(one) for one in ranks.values())


def test_one_process_keeps_the_whole_state(run):
    told = run.text("train", steps=2, shard_optimizer="yes", **RUN).ok()
    assert "sharded" not in told.stdout


# Wide, so that parameters, gradients and the state are most of the memory: 6.3 MiB, as much, and twice that.
def test_auto_shards_where_the_whole_state_does_not_fit(run):
    wide = {"layers": 2, "heads": 4, "width": 256, "length": 32, "batch": 8, "micro_batch": "auto", "steps": 3,
            "processes": 2, "no_guard": True}
    roomy = run.text("train", run="roomy", **wide | {"memory": "200MiB"}).ok()
    assert "sharded" not in roomy.stdout
    tight = run.text("train", run="tight", **wide | {"memory": "24MiB"}).ok()
    assert "sharded" in tight.stdout, tight.stdout
    assert close(tight.column("loss"), roomy.column("loss"), 1e-4)
    assert max(tight.column("peak_bytes")) <= 24 << 20
    run.text("train", run="whole", **wide | {"memory": "24MiB", "shard_optimizer": "no"}).misfit()
