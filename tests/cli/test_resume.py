"""A run resumes from its last checkpoint as if it had never been interrupted."""

import json
import re
import shutil
import signal
import struct
import tomllib

import pytest

from conftest import TEXT, lines_of, stop_in_a_batch, weights_file, words_of
from resuming import (  # noqa: F401
    JOBS, OFTEN, assert_same, at_once, checkpoints_of, contents, cut, killed, long_steps, resume, told_of, train, whole)
from test_guard import CLIMB

# It resumes as if nothing had happened

@pytest.mark.parametrize("job", JOBS)
def test_a_resumed_run_is_bit_for_bit_the_one_that_was_never_stopped(run, resume, job):
    reference = train(run, "reference", job).ok()
    for after in (4, 8):
        folder = cut(reference.folder, run.folder / "run", after)
        assert_same(resume().ok(), reference)
        shutil.rmtree(folder)


def job_words(run, **flags):
    """The words of the job of `whole`, without its folder."""
    flags = OFTEN | JOBS["gpt"][1] | flags
    return words_of({"data": run.data.text} | TEXT | {"memory": at_once(run, "text", **flags)} | flags)


def test_a_run_that_is_extended_repeatedly_equals_the_long_run(run, resume):
    reference = train(run, "reference", schedule="constant").ok()
    flags = {"schedule": "constant", "memory": at_once(run, "text", micro_batch=3, dropout=0.1)}
    for steps, before in ((3, None), (5, 3), (12, 5)):
        result = resume("--json", *job_words(run, **flags, steps=steps)).ok()
        assert result.document["resumed_from"] == before and len(result.metrics) == steps
    assert_same(result, reference)


def test_it_says_from_where_it_resumes(killed, resume):
    result = resume().ok()
    assert told_of(result) == ("from step 8", []) and result.stderr == ""


def test_the_document_says_from_where_it_was_resumed(run, killed, resume):
    assert resume("--json").ok().document["resumed_from"] == 8
    assert run.text("train", run="another", json=True).ok().document["resumed_from"] is None


def test_the_document_is_of_the_whole_run(killed, resume, whole):
    told = resume("--json").ok().document
    assert told["steps"] == 12 and told["samples"] == 96 and told["interrupted"] is False
    assert told["first_loss"] == whole.metrics[0]["loss"] and told["loss"] == whole.metrics[-1]["loss"]


def test_a_folder_may_be_moved_and_resumed_from_elsewhere(run, data, killed, whole):
    (run.folder / "elsewhere").mkdir()
    killed.rename(run.folder / "elsewhere" / "moved")
    elsewhere = type(run)(run.folder / "elsewhere", data)
    assert_same(elsewhere.in_folder("moved", ["train", "--run", "moved", "--resume"]).ok(), whole)


def test_the_log_is_truncated_at_the_checkpoint(killed, resume, whole):
    log = killed / "metrics.jsonl"
    log.write_text(log.read_text()[:-40])  # in the middle of a line
    assert_same(resume().ok(), whole)


def test_missing_lines_before_the_checkpoint_are_reported(killed, resume, whole):
    """A disk was full, and the run was killed before it could write what was missing."""
    log = killed / "metrics.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:5]))
    result = resume().ok()
    assert told_of(result) == ("from step 8", ["metrics.jsonl lacks 3 of these steps"])
    assert result.column("step") == [1, 2, 3, 4, 5, 9, 10, 11, 12] and weights_file(result) == weights_file(whole)


@pytest.mark.parametrize("place", [3, 100], ids=["at its beginning", "in its midst"])
def test_only_a_corrupted_line_of_the_log_is_dropped(killed, resume, whole, place):
    log = killed / "metrics.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    lines[4] = lines[4][:place] + b"\xff" + lines[4][place + 1 :]
    log.write_bytes(b"".join(lines))
    result = resume().ok()
    (note,) = told_of(result)[1]
    assert note == "metrics.jsonl lacks 1 of these steps"
    assert result.column("step") == [1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12] and weights_file(result) == weights_file(whole)
    # Nor does another process lose any.
    shutil.rmtree(checkpoints_of(killed)[-1])
    result = resume().ok()
    assert result.column("step") == [1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12] and weights_file(result) == weights_file(whole)


# From inside a batch

@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_was_stopped_inside_a_batch_is_the_same_too(run, gate, resume, long_steps, sent):
    reference = run.text("train", run="reference", **long_steps).ok()
    stop_in_a_batch(run, gate, sent, after_steps=1, micro_batches=10, **long_steps)
    assert checkpoints_of(run.folder / "run")[-1].name == "step-00000001-30" and lines_of(run) == 1
    result = resume("--json").ok()
    assert result.document["resumed_from"] == 1
    assert_same(result, reference)


# The same command line for the first and every later launch

@pytest.mark.parametrize("folder", ["missing", "empty", "no checkpoint yet"])
def test_without_a_checkpoint_it_starts_from_the_beginning_and_says_so(run, resume, whole, folder):
    if folder == "empty":
        (run.folder / "run").mkdir()
    if folder == "no checkpoint yet":
        shutil.rmtree(cut(whole.folder, run.folder / "run", log=2) / "checkpoints")
    result = resume(*job_words(run)).ok()
    assert re.fullmatch(r"no checkpoint in run yet: starting from the beginning", told_of(result)[0])
    assert_same(result, whole)


def test_without_a_checkpoint_and_data_both_are_named_as_missing(resume):
    resume().refused(2, "--run run", "no checkpoint", "--data")


@pytest.mark.parametrize("put", [lambda place: place.symlink_to("nowhere"), lambda place: place.write_text("in the way")],
                         ids=["a link that leads nowhere", "a file"])
def test_unreadable_checkpoints_are_not_ignored(killed, run, resume, put):
    words = job_words(run)
    shutil.rmtree(killed / "checkpoints")
    put(killed / "checkpoints")
    before = contents(killed)
    resume(*words).refused(5, "run/checkpoints")
    assert contents(killed) == before and (killed / "checkpoints").lstat()


def test_a_finished_run_without_checkpoints_is_not_started_again(run, resume):
    result = run.text("train", no_checkpoints=True).ok()
    before = contents(result.folder)
    for words in ([], words_of({"data": run.data.text} | TEXT)):
        resume(*words).refused(2, "no checkpoint", "model.safetensors")
        assert contents(result.folder) == before


def test_a_checkpoint_that_was_being_written_does_not_count(run, resume, whole):
    folder = cut(whole.folder, run.folder / "run", after=4, log=3)
    (written,) = checkpoints_of(folder)
    (written / "manifest.json").unlink()
    written.rename(written.with_name(written.name + ".part"))
    result = resume(*job_words(run), "--json").ok()
    assert result.document["resumed_from"] is None
    assert_same(result, whole)
    assert [entry.name for entry in checkpoints_of(folder)] == [f"step-{step:08}" for step in (4, 8, 12)]


def test_the_same_command_line_resumes_without_reporting_differences(killed, run, resume, whole):
    result = resume(*job_words(run)).ok()
    assert told_of(result) == ("from step 8", []) and result.stderr == ""
    assert_same(result, whole)


def test_without_a_checkpoint_the_flags_must_be_there(run, resume):
    resume().refused(2, "--data")
    assert not (run.folder / "run").exists()


def test_resume_needs_a_folder(run):
    run.text("train", run=None, resume=True).refused(2, "--resume", "--run")
    assert not (run.folder / "runs").exists()


def test_without_resume_a_folder_that_holds_a_run_is_refused(killed, run):
    before = contents(killed)
    run.text("train").refused(2, "run", "--resume")
    assert contents(killed) == before


def test_what_was_measured_at_first_is_not_measured_again(run, resume):
    """Neither the micro-batch nor the memory that was free then, which would be others by now."""
    flags = {"dropout": 0.1, "batch": 16, "memory": None}
    words = words_of({"data": run.data.text} | TEXT | flags)
    first = resume(*words, "--steps", "12", "--schedule", "constant").ok()
    held = bytearray(2**28)  # memory that is no longer free
    result = resume(*words, "--steps", "24", "--schedule", "constant").ok()
    assert held is not None and told_of(result) == ("from step 12", ["steps was 12, is 24"])
    assert len(set(result.column("micro_batch"))) == 1
    whole = run.text("train", run="whole", steps=24, schedule="constant", micro_batch=first.metrics[0]["micro_batch"],
                     recompute="always" if first.metrics[0]["recompute"] else "never", **flags).ok()
    assert weights_file(result) == weights_file(whole)


def test_a_configuration_file_counts_as_flags(killed, run, resume, whole):
    assert_same(resume("--config", whole.folder / "config.toml").ok(), whole)


# Runs that are done

def test_resuming_a_complete_run_writes_its_results_and_says_so(run, whole, resume):
    folder = shutil.copytree(whole.folder, run.folder / "run")
    for name in ("model.safetensors", "report.html", "summary.json"):
        (folder / name).unlink()
    result = resume("--json").ok()
    assert "done" in result.stderr and result.document["resumed_from"] == 12 == result.document["steps"]
    assert_same(result, whole)
    assert (folder / "report.html").stat().st_size > 50_000 and (folder / "summary.json").exists()
    assert result.document["held_out_loss"] == json.loads((whole.folder / "summary.json").read_text())["held_out_loss"]


def test_a_complete_run_continues_with_a_larger_length(run, resume):
    longer = train(run, "longer", schedule="constant", steps=20).ok()
    train(run, "run", schedule="constant").ok()
    result = resume("--steps", "20").ok()
    assert_same(result, longer)
    assert tomllib.loads((result.folder / "config.toml").read_text())["steps"] == 20


def test_a_run_beyond_the_new_length_is_complete(run, whole, resume):
    folder = shutil.copytree(whole.folder, run.folder / "run")
    (folder / "model.safetensors").unlink()
    result = resume("--steps", "5").ok()
    assert told_of(result) == ("from step 12, the last one: to train further, give a greater length", ["steps was 12, is 5"])
    assert weights_file(result) == weights_file(whole) and result.column("step") == list(range(1, 13))


# What else is in the folder

def test_the_configuration_is_that_of_the_resumed_run_and_repeats_it(run, killed, whole, resume):
    before = (whole.folder / "config.toml").read_text()
    resume().ok()
    assert (killed / "config.toml").read_text() == before and "resume" not in before
    again = run.in_folder("again", ["train", "--config", "run/config.toml", "--run", "again"]).ok()
    assert_same(again, whole)


def test_the_configuration_has_the_flags_given_with_resume(killed, resume):
    resume("--lr", "0.002", "--steps", "14").ok()
    written = tomllib.loads((killed / "config.toml").read_text())
    assert (written["lr"], written["steps"], written["batch"], written["micro-batch"]) == (0.002, 14, 8, 3)


def test_the_page_has_every_step_once(killed, resume):
    resume().ok()
    page = (killed / "report.html").read_text()
    assert f'"step":[{",".join(map(str, range(1, 13)))}]' in page


def fields_of(raw):
    """(number, value) of a protobuf message's fields."""

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            value |= (raw[at] & 127) << shift
            shift, at = shift + 7, at + 1
            if raw[at - 1] < 128:
                return value

    at = 0
    while at < len(raw):
        number, kind = divmod(varint(), 8)
        size = {0: 0, 1: 8, 5: 4}.get(kind)
        if kind == 0:
            yield number, varint()
            continue
        size = varint() if size is None else size
        yield number, raw[at : at + size]
        at += size


def events_of(file):
    """{field: value} of each event: 1 the time, 2 the step, 3 the version, 5 the summary, 7 the session log."""
    raw, events = file.read_bytes(), []
    while raw:
        (size,) = struct.unpack("<Q", raw[:8])
        event = dict(fields_of(raw[12 : 12 + size]))
        events.append(event | {1: struct.unpack("<d", event[1])[0]})
        raw = raw[16 + size :]
    return events


def event_files(folder):
    return sorted(folder.glob("events.out.tfevents.*"), key=lambda file: file.stat().st_mtime_ns)


def drawn_by_tensorboard(files):
    """The steps of the losses that it draws: a session that starts purges what is there of its step and later ones."""
    steps = []
    for event in (event for file in files for event in events_of(file)):
        if 7 in event and dict(fields_of(event[7]))[1] == 1:
            steps = [step for step in steps if step < event.get(2, 0)]
        steps += [event[2]] if b"train/loss" in event.get(5, b"") else []
    return steps


def test_every_process_has_a_file_of_events_and_every_step_is_drawn_once(killed, resume, whole):
    first = event_files(killed)
    assert len(first) == 1 and drawn_by_tensorboard(first) == list(range(1, 13))
    before = first[0].read_bytes()
    resume().ok()
    resume("--steps", "14").ok()
    files = event_files(killed)
    assert len(files) == 3 and files[0] == first[0] and first[0].read_bytes() == before
    for file, step in zip(files[1:], (9, 13)):
        start = [event for event in events_of(file) if 7 in event]
        assert len(start) == 1 and dict(fields_of(start[0][7])) == {1: 1} and start[0][2] == step
    assert drawn_by_tensorboard(files) == list(range(1, 15))


# Guard

def test_a_resumed_run_rolls_back_at_the_same_steps_as_the_uninterrupted_one(run, resume):
    flags = CLIMB | {"lr": 4.8, "warmup": "240 steps", "steps": 240, "restores": 20, "checkpoint_every": "30 steps", "keep": 9}
    reference = run.text("train", run="reference", **flags).ok()
    assert sum(line["rolled_back_to"] is not None for line in reference.metrics) >= 2
    places = [(line["step"], line["rolled_back_to"]) for line in reference.metrics if line["rolled_back_to"] is not None]
    for after in (90, 120, 150):
        shutil.rmtree(run.folder / "run", ignore_errors=True)
        cut(reference.folder, run.folder / "run", after, log=after + 5)
        result = resume("--json").ok()
        assert [(line["step"], line["rolled_back_to"]) for line in result.metrics if line["rolled_back_to"] is not None] == places
        assert result.document["restores"] == len(places)
        assert_same(result, reference)


def test_a_run_that_lost_only_its_weights_gets_them_back_by_resuming(run):
    result = run.text("train", run="run", steps=3).ok()
    weights = result.folder / "model.safetensors"
    wanted = weights.read_bytes()
    weights.write_bytes(wanted[:-4] + b"old!")  # of an earlier step, as an interrupt leaves it
    run("train", "--run", "run", "--resume").ok()
    assert weights.read_bytes() == wanted
