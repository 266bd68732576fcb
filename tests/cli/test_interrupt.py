"""Ctrl-C at any moment: all work is saved to the disk, and the command ends soon."""

import json
import pathlib
import re
import signal

import pytest

from conftest import Result, ended, lines_of, stop_in_a_batch
from gate import deliver, wait_until


@pytest.fixture
def interrupted(run):
    """A long run that got the signal after three steps."""

    def stop(sent, **flags):
        process = run.start("train", steps="30M", micro_batch=8, **flags)
        wait_until(lambda: lines_of(run) >= 3, process)
        process.send_signal(sent)
        out, err = ended(process)
        return Result(process.returncode, out, err, run.folder / "run")

    return stop


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_run_with_everything_written(interrupted, sent):
    result = interrupted(sent)
    assert result.returncode == 130 and result.stderr == ""
    steps = result.column("step")
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 3
    assert sum(len(numbers) for _, numbers in result.weights.values()) == 21472
    summary = result.stdout[result.stdout.index("stopped") :]
    assert f"{len(steps):,} steps" in summary and "model.safetensors" in summary and "peak" in summary


def test_the_document_says_that_the_run_was_interrupted(interrupted):
    result = interrupted(signal.SIGINT, json=True)
    assert result.returncode == 130
    assert result.document["interrupted"] is True and result.document["steps"] == len(result.metrics)


@pytest.mark.parametrize("trials", [0, 4])
def test_a_signal_during_planning_ends_the_command(run, gate, trials):
    gate.close(after=trials)
    process = run.start("plan", gate, batch=64)
    gate.wait(process)
    deliver(process, signal.SIGINT)
    gate.open()
    out, _ = ended(process)
    assert process.returncode == 130 and "chosen" not in out


def processes_with(word):
    found = []
    for entry in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [entry] if word.encode() in entry.read_bytes() else []
        except OSError:
            pass  # gone meanwhile
    return found


@pytest.mark.parametrize("kept", [False, True], ids=["in a folder of its own", "in a folder that stays"])
def test_a_comparison_can_be_interrupted_and_leaves_neither_processes_nor_folders(run, monkeypatch, kept):
    place = run.folder / "place"
    place.mkdir()
    monkeypatch.setenv("TMPDIR", str(place))
    process = run.start("compare", samples="30M", **({"run": str(place / "kept")} if kept else {}))
    # Its child is at work, and has made a step.
    wait_until(lambda: any(file.stat().st_size for file in place.glob("**/metrics.jsonl")), process)
    process.send_signal(signal.SIGINT)
    ended(process)
    assert process.returncode == 130
    assert processes_with(str(place)) == []
    if kept:
        # The child has ended like an interrupted run.
        assert {path.name for path in (place / "kept").iterdir()} == {"small-batch-1"}
        assert (place / "kept" / "small-batch-1" / "model.safetensors").exists()
    else:
        assert list(place.iterdir()) == []


LONG_BATCH = {"batch": 1000, "micro_batch": 1, "steps": 100}


@pytest.mark.parametrize("kept", [True, False])
def test_the_document_of_a_run_that_made_no_step_has_no_losses(run, gate, kept):
    flags = LONG_BATCH | {"json": True, "no_checkpoints": None if kept else True}
    told = json.loads(stop_in_a_batch(run, gate, signal.SIGINT, **flags)[0])
    assert told["interrupted"] is True and told["steps"] == 0
    assert told["first_loss"] is None and told["loss"] is None
    assert told["run"] == ("run" if kept else None) and (run.folder / "run").exists() == kept


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("micro_batches", [1, 500, 999])
def test_a_signal_ends_the_run_inside_a_batch_and_nothing_of_it_is_lost(run, gate, sent, micro_batches):
    out, err = stop_in_a_batch(run, gate, sent, micro_batches=micro_batches, **LONG_BATCH)
    assert err == ""
    (checkpoint,) = (run.folder / "run" / "checkpoints").iterdir()
    assert checkpoint.name == f"step-00000000-{micro_batches}"
    assert lines_of(run) == 0 and re.search(r"^continue +microbatch train --run run --resume$", out, re.MULTILINE)


@pytest.mark.parametrize("first, second", [
    (signal.SIGINT, signal.SIGINT), (signal.SIGINT, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT),
    (signal.SIGHUP, signal.SIGINT),
], ids=lambda sent: sent.name)
def test_two_signals_end_the_run_immediately(run, gate, first, second):
    # It stands in a micro-batch, so that the first signal cannot end the run.
    process = run.start_closed("train", gate, after=1, **LONG_BATCH)
    deliver(process, first)
    assert process.poll() is None
    gate.advance(0.3)  # what comes within 0.2 s is taken for one
    process.send_signal(second)
    ended(process)
    assert process.returncode == -second
    assert list((run.folder / "run").glob("checkpoints/step-*")) == []


def test_a_signal_that_is_sent_twice_at_once_counts_once(run, gate):
    """As coreutils' timeout sends it: to the process and to its group."""
    process = run.start_closed("train", gate, after=1, **LONG_BATCH)
    gate.stop_clock()
    for _ in range(2):
        deliver(process, signal.SIGTERM)
        gate.advance(0.1)
    gate.open()
    ended(process)
    assert process.returncode == 130 and len(list((run.folder / "run" / "checkpoints").iterdir())) == 1


def test_a_signal_that_was_ignored_from_the_start_stays_ignored(run):
    """As nohup starts a command."""
    ignoring = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    process = run.start("train", options=ignoring, steps="30M", micro_batch=8)
    wait_until(lambda: lines_of(run) >= 3, process)
    process.send_signal(signal.SIGHUP)
    before = lines_of(run)
    wait_until(lambda: lines_of(run) > before + 20, process)
    process.send_signal(signal.SIGTERM)
    ended(process)
    assert process.returncode == 130


def test_the_end_after_a_signal_does_not_wait_for_the_held_out_samples(run, gate):
    process = run.start_closed("train", gate, lines=1, micro_batch=8, steps=100, json=True)
    deliver(process, signal.SIGINT)
    # Held-out samples are run after the weights are written. It would stand there.
    weights = run.folder / "run" / "model.safetensors"
    gate.close(weights, point="switch")
    gate.release()
    wait_until(lambda: gate.is_holding or process.poll() is not None)
    assert not gate.is_holding
    document = json.loads(ended(process)[0])
    assert process.returncode == 130 and weights.exists() and document["held_out_loss"] is None


@pytest.mark.parametrize("switches", [0, 20])
def test_a_signal_while_the_held_out_samples_are_run_ends_with_everything_written(run, gate, switches):
    gate.close(run.folder / "run" / "model.safetensors", after=switches, point="switch")
    process = run.start("train", gate, batch=64, micro_batch=8, steps=4, json=True)
    gate.wait(process)
    deliver(process, signal.SIGINT)
    gate.open()
    document = json.loads(ended(process)[0])
    assert process.returncode == 130 and document["interrupted"] is True
    assert document["held_out_loss"] is None and document["steps"] == 4
    assert (run.folder / "run" / "model.safetensors").exists()


def test_a_run_that_was_killed_leaves_whole_lines(run):
    process = run.start("train", steps="30M", micro_batch=8)
    wait_until(lambda: lines_of(run) >= 3, process)
    process.kill()
    process.communicate()
    raw = (run.folder / "run" / "metrics.jsonl").read_bytes()
    assert raw.endswith(b"\n") and [json.loads(line)["step"] for line in raw.splitlines()][:3] == [1, 2, 3]
