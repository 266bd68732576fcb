"""Ctrl-C at any moment: all work is saved to the disk, and the command ends soon."""

import json
import pathlib
import re
import signal
import subprocess
import time

import pytest

from conftest import FORTUNES, Result


def wait_for(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.02)


def lines_of(run, name="run"):
    file = run.folder / name / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else -1


@pytest.fixture
def interrupted(run):
    """A long run that got the signal after three steps."""

    def stop(sent, **flags):
        process = run.start("train", steps="30M", micro_batch=8, **flags)
        wait_for(lambda: lines_of(run) >= 3, process)
        process.send_signal(sent)
        out, err = process.communicate(timeout=60)
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


@pytest.mark.parametrize("seconds", [0.5, 1])
def test_a_signal_during_planning_ends_the_command(run, seconds):
    process = run.start("plan", data=FORTUNES, model="gpt-small", layers=6, width=384, length=256, batch=512,
                        memory="2GiB")
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT) and "chosen" not in out


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
    wait_for(lambda: any(file.stat().st_size for file in place.glob("**/metrics.jsonl")), process, 60)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert processes_with(str(place)) == []
    if kept:
        # The child has ended like an interrupted run.
        assert {path.name for path in (place / "kept").iterdir()} == {"small-batch-1"}
        assert (place / "kept" / "small-batch-1" / "model.safetensors").exists()
    else:
        assert list(place.iterdir()) == []


def interrupted_in_a_batch(run, sent, after=0, **flags):
    # A batch of many seconds, micro-batches of a thousandth of one.
    process = run.start("train", **{"batch": 100_000, "micro_batch": 1, "steps": 100} | flags)
    wait_for(lambda: lines_of(run) == after, process)
    time.sleep(0.5)
    process.send_signal(sent)
    out, err = process.communicate(timeout=4)
    assert process.returncode == 130, err
    return out, err


@pytest.mark.parametrize("kept", [True, False])
def test_the_document_of_a_run_that_made_no_step_has_no_losses(run, kept):
    told = json.loads(interrupted_in_a_batch(run, signal.SIGINT, json=True, no_checkpoints=None if kept else True)[0])
    assert told["interrupted"] is True and told["steps"] == 0
    assert told["first_loss"] is None and told["loss"] is None
    assert told["run"] == ("run" if kept else None) and (run.folder / "run").exists() == kept


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_run_inside_a_batch_and_nothing_of_it_is_lost(run, sent):
    out, err = interrupted_in_a_batch(run, sent)
    assert err == ""
    (checkpoint,) = (run.folder / "run" / "checkpoints").iterdir()
    samples = int(re.fullmatch(r"step-00000000-(\d+)", checkpoint.name)[1])
    assert 0 < samples < 100_000
    assert lines_of(run) == 0 and re.search(r"^continue +microbatch train --run run --resume$", out, re.MULTILINE)


@pytest.mark.parametrize("first, second", [
    (signal.SIGINT, signal.SIGINT), (signal.SIGINT, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT),
    (signal.SIGHUP, signal.SIGINT),
], ids=lambda sent: sent.name)
def test_two_signals_end_the_run_immediately(run, first, second):
    # A micro-batch of many seconds, so that the first signal cannot have ended the run by itself.
    process = run.start("train", data=FORTUNES, layers=2, width=256, length=256, batch=128, micro_batch=128,
                        recompute="always", memory="4GiB", no_verify=True, noise_every=0, steps=100)
    wait_for(lambda: lines_of(run) == 0, process)
    time.sleep(0.3)
    process.send_signal(first)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(second)
    process.communicate(timeout=2)
    assert process.returncode in (130, -second)
    assert list((run.folder / "run").glob("checkpoints/step-*")) == []


def test_a_signal_that_is_sent_twice_at_once_counts_once(run):
    """As coreutils' timeout sends it: to the process and to its group."""
    process = run.start("train", batch=100_000, micro_batch=1, steps=100)
    wait_for(lambda: lines_of(run) == 0, process)
    time.sleep(0.3)
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.001)
    process.communicate(timeout=10)
    assert process.returncode == 130 and len(list((run.folder / "run" / "checkpoints").iterdir())) == 1


def test_a_signal_that_was_ignored_from_the_start_stays_ignored(run):
    """As nohup starts a command."""
    process = run.start("train", lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN), steps="30M", micro_batch=8)
    wait_for(lambda: lines_of(run) >= 3, process)
    process.send_signal(signal.SIGHUP)
    before = lines_of(run)
    wait_for(lambda: lines_of(run) > before + 20, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 130


def test_the_end_after_a_signal_does_not_wait_for_the_held_out_samples(run):
    # A tenth of all fortunes are thousands of held-out samples: many times longer than the step that is being finished.
    process = run.start("train", data=FORTUNES, layers=6, heads=4, width=256, length=128, micro_batch=8, steps="30M",
                        memory="1GiB")
    wait_for(lambda: lines_of(run) >= 1, process)
    process.send_signal(signal.SIGINT)
    try:
        process.communicate(timeout=4)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        pytest.fail("still busy four seconds after the signal, weights written: "
                    f"{(run.folder / 'run' / 'model.safetensors').exists()}")
    assert process.returncode == 130 and (run.folder / "run" / "model.safetensors").exists()


def test_a_signal_while_the_held_out_samples_are_run_ends_with_everything_written(run):
    # As many held-out samples as four steps had: longer than the last step by far.
    process = run.start("train", data=FORTUNES, layers=6, heads=4, width=256, length=128, batch=64, micro_batch=8,
                        steps=4, memory="1GiB", json=True)
    wait_for(lambda: lines_of(run) == 4, process)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    document = json.loads(out)
    assert process.returncode == 130 and document["interrupted"] is True
    assert document["held_out_loss"] is None and document["steps"] == 4
    assert (run.folder / "run" / "model.safetensors").exists()


def test_a_run_that_was_killed_leaves_whole_lines(run):
    process = run.start("train", steps="30M", micro_batch=8)
    wait_for(lambda: lines_of(run) >= 3, process)
    process.kill()
    process.communicate()
    raw = (run.folder / "run" / "metrics.jsonl").read_bytes()
    assert raw.endswith(b"\n") and [json.loads(line)["step"] for line in raw.splitlines()][:3] == [1, 2, 3]
