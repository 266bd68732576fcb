"""Several processes: started by --processes or by torchrun, they train as one."""

import os
import signal
import socket
import subprocess
import time

import pytest

from conftest import COMMAND, HANG, ROOT, stop_in_a_batch, weights_file
from rank_runs import LOST, RUN, close, has_ended, ranks_of, start_three

TORCHRUN = ROOT / ".venv" / "bin" / "torchrun"


@pytest.mark.parametrize("job", ["text", "images"])
def test_any_number_of_processes_makes_the_run_of_one(run, job):
    train = getattr(run, job)
    alone = train("train", run="one", steps=4, **RUN).ok()
    for size in (2, 3):
        told = train("train", run=f"of-{size}", steps=4, processes=size, **RUN).ok()
        # fp32 sums of a few hundred terms in another order.
        assert close(told.column("loss"), alone.column("loss"), 1e-6)
        assert close(told.column("gradient_norm"), alone.column("gradient_norm"), 1e-5)
        assert told.column("weight") == alone.column("weight")
        assert f"in each of {size} processes" in told.stdout
        assert told.files == alone.files


def test_more_processes_than_samples_train_too(run):
    few = RUN | {"batch": 2, "micro_batch": 1}
    alone = run.text("train", run="one", steps=3, **few).ok()
    told = run.text("train", run="many", steps=3, processes=4, **few).ok()
    assert close(told.column("loss"), alone.column("loss"), 1e-6)


def test_batch_norm_is_deferred_over_processes(run):
    flags = RUN | {"norm": "batch", "batch": 12, "micro_batch": 2, "steps": 3}
    alone = run.images("train", run="one", batch_norm="deferred", **flags).ok()
    told = run.images("train", run="three", processes=3, **flags).ok()
    assert close(told.column("loss"), alone.column("loss"), 1e-6)
    assert "BatchNorm deferred" in told.stdout
    run.images("train", run="exact", processes=2, batch_norm="exact", **flags).refused(2, "exact BatchNorm", "deferred")


def test_torchrun_starts_the_same_run(run):
    own = run.text("train", run="own", steps=4, processes=2, **RUN).ok()
    words = ["train", "--data", run.data.text, "--run", "torchrun", "--steps", 4, "--layers", 1, "--heads", 2, "--width", 32,
             "--length", 16, "--threads", 1, "--memory", "64MiB", "--batch", 7, "--micro-batch", 2, "--optimizer", "sgd",
             "--schedule", "constant"]
    done = subprocess.run([TORCHRUN, "--no-python", "--nproc-per-node", "2", "--", COMMAND, *map(str, words)],
                          cwd=run.folder, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr
    assert (run.folder / "torchrun" / "model.safetensors").read_bytes() == weights_file(own)


def test_a_run_is_resumed_by_any_number_of_processes(run):
    whole = run.text("train", run="whole", steps=8, **RUN).ok()
    run.text("train", run="parts", steps=2, processes=3, **RUN).ok()
    for steps, size in ((4, 1), (6, 4), (8, 2)):
        told = run.in_folder("parts", ["train", "--run", "parts", "--resume", "--steps", steps, "--processes", size]).ok()
    assert close(told.column("loss"), whole.column("loss"), 1e-6)


def test_a_run_that_diverges_rolls_back_on_all_and_ends_on_all(run):
    run.text("train", steps=150, micro_batch=4, processes=2).ok()
    words = ["train", "--run", "run", "--resume", "--processes", 2, "--lr", 30, "--schedule", "constant", "--clip", "inf",
             "--steps", 260]
    told = run.in_folder("run", words)
    assert told.returncode == 4, told.stderr
    assert "the run diverged" in told.stderr and "rank" not in told.stderr
    assert any(line.get("rolled_back_to") is not None for line in told.metrics)


def test_a_batch_that_one_process_left_half_way_is_made_by_several(run, gate):
    whole = run.text("train", run="whole", steps=4, micro_batch=1).ok()
    stop_in_a_batch(run, gate, signal.SIGINT, after_steps=1, micro_batches=6, steps=4, micro_batch=1)
    told = run.in_folder("run", ["train", "--run", "run", "--resume", "--processes", 2]).ok()
    assert close(told.column("loss"), whole.column("loss"), 1e-5)


# Faults.

@pytest.mark.parametrize("number, victim", [(signal.SIGKILL, 1), (signal.SIGKILL, 0), (signal.SIGSTOP, 2)])
def test_the_others_end_soon_after_a_rank_and_name_it(run, number, victim):
    process, ranks = start_three(run)
    began = time.monotonic()
    os.kill(ranks[victim], number)
    while not all(has_ended(ranks[one]) for one in ranks if one != victim):
        assert time.monotonic() - began < 10
        time.sleep(0.05)
    errors = process.communicate(timeout=HANG)[1]
    assert process.returncode == LOST
    assert f"rank {victim} " in errors, errors
    # Those that are left go on from the last checkpoint.
    steps = len((run.folder / "run" / "metrics.jsonl").read_bytes().splitlines()) + 5
    words = ["train", "--run", "run", "--resume", "--processes", 2, "--steps", steps]
    assert run.in_folder("run", words).ok().column("step") == list(range(1, steps + 1))


def test_an_interrupt_ends_all_with_a_checkpoint(run):
    process, ranks = start_three(run)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=HANG)
    assert process.returncode == 130
    steps = len((run.folder / "run" / "metrics.jsonl").read_bytes().splitlines())
    assert (run.folder / "run" / "checkpoints" / f"step-{steps:08}").is_dir()
    assert all(has_ended(one) for one in ranks.values())


def test_an_interrupt_of_one_rank_is_one_of_all(run):
    process, ranks = start_three(run)
    os.kill(ranks[2], signal.SIGTERM)
    process.communicate(timeout=HANG)
    assert process.returncode == 130


@pytest.fixture
def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_by_hand(run, rank, port, **flags):
    environment = os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return run.start("train", options={"env": environment}, **{"steps": 2, **RUN, **flags})


def both_refuse(run, port, says, **other):
    processes = [start_by_hand(run, 0, port), start_by_hand(run, 1, port, **other)]
    for process in processes:
        errors = process.communicate(timeout=HANG)[1]
        assert process.returncode == 2 and says in errors, errors
    assert not (run.folder / "run").exists()


@pytest.mark.parametrize("other, says", [({"lr": 0.1}, "rank 1 was started with other settings: --lr is 0.1"),
                                         ({"seed": 2}, "--seed is 2, and 1 on rank 0"),
                                         ({"batch": 8}, "--batch is 8, and 7 on rank 0")])
def test_a_rank_with_other_settings_is_refused_at_the_start(run, other, says, free_port):
    both_refuse(run, free_port, says, **other)


def test_a_rank_with_other_data_is_refused_at_the_start(run, free_port):
    (run.folder / "other.txt").write_text("another text than that of the others " * 100)
    both_refuse(run, free_port, "rank 1 was started differently: it has data", data="other.txt")


@pytest.mark.parametrize("variables, says", [({"WORLD_SIZE": "2"}, "RANK is not"), ({"WORLD_SIZE": "x"}, 'WORLD_SIZE is "x"'),
                                             ({"WORLD_SIZE": "2", "RANK": "2"}, "from 0 to 1"),
                                             ({"WORLD_SIZE": "2", "RANK": "1"}, "MASTER_ADDR is not")])
def test_an_environment_that_is_not_whole_is_refused(run, variables, says):
    run.environment = os.environ | variables
    run.text("train", **RUN).refused(2, says)


def test_a_contradiction_is_refused(run):
    run.environment = os.environ | {"WORLD_SIZE": "2", "RANK": "0"}
    run.text("train", processes=3, **RUN).refused(2, "--processes 3 contradicts WORLD_SIZE")


def test_what_does_not_fit_is_said_once(run):
    run.text("train", processes=2, **RUN | {"memory": "64KiB"}).misfit()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_stopped_before_it_has_joined_is_not_waited_for(run, victim):
    process = run.start("train", steps=100_000, processes=2, **RUN)
    ranks = {}
    while len(ranks) < 2:
        try:
            ranks = ranks_of(process.pid)
        except (OSError, StopIteration, subprocess.CalledProcessError):  # not started yet
            time.sleep(0.005)
    os.kill(ranks[victim], signal.SIGSTOP)
    began = time.monotonic()
    errors = process.communicate(timeout=HANG)[1]
    assert time.monotonic() - began < 10
    assert process.returncode == LOST
    assert f"rank {victim} was stopped" in errors
