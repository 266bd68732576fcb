"""Checkpoints: when they are written, what is in them, how many are kept, and what happens if they cannot be written."""

import json
import os
import pathlib
import re
import resource
import signal
import struct
import subprocess

import pytest

from conftest import (
    COMMAND, FILES, IMAGES, TEXT, Result, ended, lines_of, stop_in_a_batch, weights_file, words_of)
from gate import wait_until
from resuming import assert_same, at_once, checkpoints_of, contents, without_times

PARTS = {"model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", "manifest.json"}
LONG = {"steps": "30M", "micro_batch": 8, "checkpoint_every": "10 steps"}


def names_of(result):
    return sorted(entry.name for entry in (result.folder / "checkpoints").iterdir())


def steps(*numbers):
    return [f"step-{number:08}" for number in numbers]


def tensors_of(file):
    """{name: (dtype, shape, bytes)} of a safetensors file, by the format's own description."""
    raw = file.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header, body = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    header.pop("__metadata__", None)
    assert max((entry["data_offsets"][1] for entry in header.values()), default=0) == len(body)
    return {name: (entry["dtype"], entry["shape"], body[slice(*entry["data_offsets"])]) for name, entry in header.items()}


# When, and how many

@pytest.mark.parametrize("flags, names", [
    ({"steps": 250}, steps(100, 200, 250)),
    ({"steps": 6, "checkpoint_every": "2 steps"}, steps(2, 4, 6)),
    ({"steps": 9, "checkpoint_every": "2 steps"}, steps(6, 8, 9)),
    ({"steps": 9, "checkpoint_every": "2 steps", "keep": 1}, steps(9)),
    ({"steps": 9, "checkpoint_every": "2 steps", "keep": 9}, steps(2, 4, 6, 8, 9)),
    ({"steps": 12, "checkpoint_every": "1 steps", "keep": 2, "keep_every": "5 steps"}, steps(5, 10, 11, 12)),
    ({"steps": 12, "checkpoint_every": "1 steps", "keep": 1, "keep_every": "32 samples"}, steps(4, 8, 12)),
    ({"steps": 9, "checkpoint_every": "24 samples"}, steps(3, 6, 9)),
    ({"steps": 9, "checkpoint_every": "20 samples"}, steps(5, 8, 9)),
    ({"steps": 9, "checkpoint_every": "512 tokens"}, steps(4, 8, 9)),
    ({"steps": 9, "checkpoint_every": "0 steps"}, steps(9)),
    ({"steps": 3}, steps(3)),
], ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "")
def test_checkpoints_are_written_when_due_and_the_last_ones_are_kept(run, flags, names):
    result = run.text("train", memory=at_once(run, "text"), micro_batch=8, **flags).ok()
    assert names_of(result) == names
    assert result.files == FILES


def test_a_run_says_how_often_it_writes_them(run):
    result = run.text("train", checkpoint_every="2 steps", keep=2, keep_every="40 samples").ok()
    assert re.search(r"^saved     every 2 steps, keeping the newest 2, and one every 40 samples$", result.stdout, re.MULTILINE)


def test_no_checkpoints_means_none(run):
    result = run.text("train", no_checkpoints=True, steps=4).ok()
    assert result.files == FILES - {"checkpoints"}
    run.text("train").refused(2, "already", "--resume")


def test_checkpoints_change_no_bit_of_the_run(run):
    flags = {"steps": 12, "dropout": 0.1, "micro_batch": 3, "noise_every": 3}
    often = run.text("train", run="often", checkpoint_every="1 steps", **flags).ok()
    never = run.text("train", run="never", no_checkpoints=True, **flags).ok()
    assert without_times(often) == without_times(never) and weights_file(often) == weights_file(never)


@pytest.mark.parametrize("flag, values", [
    ("checkpoint_every", ["5", "-1 steps", "x", "1.5 steps", "100 furlongs", ""]),
    ("keep_every", ["5", "-1 steps", "x", ""]), ("keep", ["0", "-1", "x", "1.5", ""])])
def test_a_wrong_interval_or_number_is_refused(run, flag, values):
    for value in values:
        run.text("train", **{flag: value}).refused(2, f"--{flag.replace('_', '-')}")
    assert not (run.folder / "run").exists()


def test_a_configuration_records_how_often_they_are_written(run):
    run.text("train", run="first", checkpoint_every="2 steps", keep=5, keep_every="4 steps", steps=8,
             memory=at_once(run, "text"), micro_batch=8).ok()
    again = run("train", "--config", "first/config.toml", "--run", "run").ok()
    assert names_of(again) == steps(2, 4, 6, 8)


# What is in them

@pytest.fixture(scope="module")
def kept(shared_run):
    return shared_run.text("train", run="kept", steps=40, checkpoint_every="40 steps", micro_batch=3, dropout=0.1).ok()


def test_a_checkpoint_has_its_files_and_a_manifest_of_them(kept):
    (checkpoint,) = checkpoints_of(kept.folder)
    names = {file.name for file in checkpoint.iterdir()}
    assert names == PARTS | {"recovery.safetensors"}
    manifest = (checkpoint / "manifest.json").read_text()
    assert isinstance(json.loads(manifest), dict)
    for name in names - {"manifest.json"}:
        assert f'"{name}"' in manifest and str((checkpoint / name).stat().st_size) in manifest


def test_the_weights_are_those_that_the_run_ends_with(kept):
    (checkpoint,) = checkpoints_of(kept.folder)
    final, stored = (tensors_of(file) for file in (kept.folder / "model.safetensors", checkpoint / "model.safetensors"))
    assert final == {name: stored[name] for name in final} and set(stored) == set(final)


def test_tensors_have_readable_names(kept):
    (checkpoint,) = checkpoints_of(kept.folder)
    weights = tensors_of(checkpoint / "model.safetensors")
    optimizer = tensors_of(checkpoint / "optimizer.safetensors")
    for name, (dtype, shape, _) in weights.items():
        moments = [tensor for key, tensor in optimizer.items() if name in key and tensor[:2] == (dtype, shape)]
        assert len(moments) >= 2, name
    assert tensors_of(checkpoint / "rng.safetensors")


def test_the_snapshots_of_the_guard_are_in_it(kept):
    (checkpoint,) = checkpoints_of(kept.folder)
    weights = tensors_of(checkpoint / "model.safetensors")
    state = json.loads((checkpoint / "state.json").read_text())
    assert [state[f"recovery/{point}/steps"] for point in range(state["recovery/points"])] == [0, 32]
    for point in range(2):
        snapshot = {name.removeprefix(f"{point}/model/"): tensor
                    for name, tensor in tensors_of(checkpoint / "recovery.safetensors").items()
                    if name.startswith(f"{point}/model/")}
        assert snapshot.keys() == weights.keys()
        assert all(snapshot[name][:2] == weights[name][:2] for name in weights)


def test_buffers_of_batch_norm_are_in_it(run):
    result = run.images("train", norm="batch", micro_batch=4).ok()
    names = tensors_of(checkpoints_of(result.folder)[-1] / "model.safetensors")
    assert any("running_mean" in name for name in names)


def test_no_pickle_and_nothing_that_runs(kept):
    for file in checkpoints_of(kept.folder)[0].iterdir():
        assert file.suffix in (".safetensors", ".json") and not file.stat().st_mode & 0o111


# Interrupted

@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_run_has_a_checkpoint_of_its_last_state(run, sent):
    process = run.start("train", **LONG | {"checkpoint_every": "0 steps"})
    wait_until(lambda: lines_of(run) >= 3, process)
    process.send_signal(sent)
    out, _ = ended(process)
    assert process.returncode == 130 and "checkpoint" in out[out.index("stopped") :]
    (checkpoint,) = checkpoints_of(run.folder / "run")
    assert checkpoint.name.split("-")[1] == f"{lines_of(run):08}"
    assert {file.name for file in checkpoint.iterdir()} >= PARTS


def test_a_run_that_ended_inside_a_batch_has_the_weights_and_buffers_of_its_last_step(run, gate):
    stop_in_a_batch(run, gate, signal.SIGTERM, after_steps=1, micro_batches=3, data=run.data.images, **IMAGES | {
        "norm": "batch", "batch_norm": "naive", "batch": None, "batch_schedule": "4 at 0, 100 at 4 samples",
        "micro_batch": 1, "heads": None, "length": None, "steps": 100})
    (checkpoint,) = checkpoints_of(run.folder / "run")
    assert checkpoint.name == "step-00000001-3"
    final, stored, opened = (tensors_of(file) for file in (
        run.folder / "run" / "model.safetensors", checkpoint / "model.safetensors", checkpoint / "batch.safetensors"))
    before = {name.removeprefix("before/model/"): tensor for name, tensor in opened.items()
              if name.startswith("before/model/")}
    assert any("running_mean" in name and stored[name] != tensor for name, tensor in before.items())
    assert final == {name: tensor for name, tensor in (stored | before).items() if name in final}
    assert set(final) == set(stored)


# How long their files are held

def held_by(process):
    """The paths of the files that it has open."""
    held = []
    for entry in pathlib.Path(f"/proc/{process.pid}/fd").iterdir():
        try:
            held.append(os.readlink(entry))
        except OSError:
            pass  # closed meanwhile
    return held


def test_a_resumed_run_holds_no_files_of_deleted_checkpoints(run):
    # Two snapshots of the guard are in the checkpoint, too.
    run.text("train", **LONG | {"steps": 40}).ok()
    folder = run.folder / "run"
    before = checkpoints_of(folder)
    process = run.start("train", resume=True, **LONG | {"keep": 1})
    try:
        wait_until(lambda: not any(checkpoint.exists() for checkpoint in before), process)
        wait_until(lambda: not any(path.startswith(f"{folder}/checkpoints/") and path.endswith("(deleted)")
                                 for path in held_by(process)), process)
    finally:
        process.kill()
        process.communicate()


# Where they cannot be written

def limited(size):
    """Limits the size of files of this process: a write beyond it is partial, and the next one fails, as on a full disk."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    return limit


# Weights have 86 KB and fit, the optimizer's state has twice that and does not.
FULL = limited(120_000)


def test_a_full_disk_is_a_warning_and_the_run_continues(run):
    result = run.in_folder("run", ["train", *words_of({"data": run.data.text} | TEXT | {
        "run": "run", "steps": 9, "checkpoint_every": "4 steps", "micro_batch": 3, "restores": 0})], preexec_fn=FULL)
    assert result.returncode == 0, result.stderr
    warnings = [line for line in (result.stdout + result.stderr).splitlines() if "warning" in line and "checkpoint" in line]
    assert warnings and all("optimizer.safetensors" in line or "step-" in line for line in warnings)
    assert any("File too large" in line for line in warnings), warnings
    assert result.column("step") == list(range(1, 10))
    assert not (result.folder / "checkpoints").exists() or list((result.folder / "checkpoints").iterdir()) == []
    assert len(result.weights) > 0


def test_a_full_disk_leaves_existing_checkpoints_untouched_and_the_run_can_be_resumed(run):
    flags = {"schedule": "constant", "checkpoint_every": "4 steps", "micro_batch": 3, "restores": 0}
    reference = run.text("train", run="reference", steps=16, **flags).ok()
    run.text("train", steps=8, **flags).ok()
    folder = run.folder / "run"
    before = contents(folder / "checkpoints")
    result = run("train", "--run", "run", "--resume", "--steps", "12", preexec_fn=FULL)
    assert result.returncode == 0 and "warning" in result.stdout + result.stderr
    assert contents(folder / "checkpoints") == before and len(result.metrics) == 12
    result = run("train", "--run", "run", "--resume", "--steps", "16", "--json").ok()
    assert result.document["resumed_from"] == 8
    assert_same(result, reference)


def test_a_full_disk_on_interrupt_is_reported_too(run):
    process = subprocess.Popen(
        [COMMAND, "train", *words_of({"data": run.data.text} | TEXT | LONG | {"run": "run", "restores": 0,
                                                                          "checkpoint_every": "0 steps"})],
        cwd=run.folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=FULL)
    wait_until(lambda: lines_of(run) >= 3, process)
    process.send_signal(signal.SIGTERM)
    out, err = ended(process)
    assert process.returncode == 130
    assert re.search(r"warning.*checkpoint", out + err), out + err
    assert list((run.folder / "run" / "checkpoints").glob("step-*")) == []


@pytest.fixture
def between_checkpoints(run, gate):
    """A run of 400 steps that stands after its 60th, with the checkpoint of step 50 written."""
    process = run.start_closed("train", gate, lines=60, **LONG | {"steps": 400, "checkpoint_every": "50 steps"})
    wait_until(lambda: checkpoints_of(run.folder / "run"), process)
    return process


def test_a_folder_that_cannot_be_created_is_a_warning_and_the_run_continues(run, gate, between_checkpoints):
    folder = run.folder / "run"
    (folder / "checkpoints").rename(run.folder / "away")
    (folder / "checkpoints").write_text("in the way")
    gate.open()
    out, err = ended(between_checkpoints)
    result = Result(between_checkpoints.returncode, out, err, folder)
    assert result.returncode == 0, err
    warning = next(line for line in (out + err).splitlines() if "warning" in line)
    assert "checkpoint" in warning and "Not a directory" in warning, warning
    assert result.column("step") == list(range(1, 401)) and (folder / "checkpoints").read_text() == "in the way"
    assert [entry.name for entry in (run.folder / "away").glob("step-*")] == steps(50)


def test_checkpoints_that_are_deleted_during_the_run_are_written_again(run, gate, between_checkpoints):
    folder = run.folder / "run"
    (folder / "checkpoints").rename(run.folder / "away")
    gate.open()
    ended(between_checkpoints)
    assert between_checkpoints.returncode == 0
    assert (folder / "checkpoints" / "step-00000400" / "manifest.json").exists()


# Two runs in one folder

@pytest.mark.parametrize("words", [[], ["--resume"]], ids=["anew", "resumed"])
def test_a_second_run_in_the_same_folder_is_refused(run, words):
    process = run.start("train", **LONG)
    try:
        wait_until(lambda: lines_of(run) >= 3, process)
        second = run("train", *words_of({"data": run.data.text} | TEXT | {"run": "run"}), *words)
        second.refused(2, "run")
        if words:
            assert re.search(r"another|in use|still|already", second.stderr), second.stderr
        before = lines_of(run)
        wait_until(lambda: lines_of(run) > before, process)
    finally:
        process.send_signal(signal.SIGTERM)
        ended(process)
    assert process.returncode == 130
    lines = [json.loads(line)["step"] for line in (run.folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(1, len(lines) + 1))


def test_of_two_that_start_together_one_trains(run, new_gate):
    begun = []
    for gate in (new_gate(), new_gate()):
        gate.close()  # it plans, and has seen that there is no run
        begun.append((gate, run.start("train", gate, resume=True, steps=300, micro_batch=8)))
    for gate, process in begun:
        gate.wait(process)
    for gate, _ in begun:
        gate.open()
    ends = {process.returncode: err for process, (_, err) in ((each, ended(each)) for _, each in begun)}
    assert set(ends) == {0, 2}, ends
    assert "run" in ends[2] and len(ends[2].splitlines()) <= 2
    assert lines_of(run) == 300


def test_of_two_that_start_the_one_that_plans_longer_does_not_overwrite_the_other(run, gate):
    gate.close()  # it plans, and has seen that there is no run
    process = run.start("train", gate, resume=True, data=run.data.tokens)
    gate.wait(process)
    before = contents(run.text("train", resume=True, micro_batch=8).ok().folder)
    gate.open()
    out, err = ended(process)
    Result(process.returncode, out, err, run.folder).refused(2, "run")
    assert contents(run.folder / "run") == before


def test_a_run_that_was_killed_holds_no_lock(run):
    process = run.start("train", **LONG)
    wait_until(lambda: checkpoints_of(run.folder / "run"), process)
    process.kill()
    process.communicate()
    result = run("train", "--run", "run", "--resume", "--steps", lines_of(run) + 5, "--json").ok()
    assert result.document["resumed_from"] > 0


def test_two_folders_do_not_wait_for_each_other(run, gate):
    process = run.start_closed("train", gate, lines=1, **LONG)
    run.text("train", run="another").ok()
    assert gate.is_holding and process.poll() is None
    process.kill()
    process.communicate()
