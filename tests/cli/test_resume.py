"""A run goes on from its last checkpoint as if it had never been stopped; what differs is said, or refused."""

import json
import re
import shutil
import signal
import struct
import time
import tomllib

import pytest

from conftest import TEXT, chosen_of, weights_file, words_of
from test_guard import CLIMB
from test_interrupt import lines_of, wait_for

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
    """A run of 12 steps that nobody disturbed, with a checkpoint every 4."""
    result = train(shared_run, "whole").ok()
    assert [checkpoint.name[-2:] for checkpoint in checkpoints_of(result.folder)] == ["04", "08", "12"]
    assert result.metrics[3]["gradient_variance"] is not None
    return result


def checkpoints_of(folder):
    """The folders of a run's checkpoints, oldest first; those that are being written are none yet."""
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
    """Two runs are the same, bit for bit: log, weights, and what a third would go on from."""
    assert without_times(result) == without_times(other)
    assert weights_file(result) == weights_file(other)
    last, others = (checkpoints_of(each.folder)[-1] for each in (result, other))
    assert last.name == others.name
    for name in ("weights", "optimizer", "generators"):
        assert (last / f"{name}.safetensors").read_bytes() == (others / f"{name}.safetensors").read_bytes(), name


# It goes on as if nothing had been

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


def test_a_run_that_is_made_longer_and_longer_is_the_long_one(run, resume):
    reference = train(run, "reference", schedule="constant").ok()
    flags = {"schedule": "constant", "memory": at_once(run, "text", micro_batch=3, dropout=0.1)}
    for steps, before in ((3, None), (5, 3), (12, 5)):
        result = resume("--json", *job_words(run, **flags, steps=steps)).ok()
        assert result.document["resumed_from"] == before and len(result.metrics) == steps
    assert_same(result, reference)


def test_it_says_from_where_it_goes_on(killed, resume):
    result = resume().ok()
    assert told_of(result) == ("from step 8", []) and result.stderr == ""


def test_the_document_tells_from_where_it_was_resumed(run, killed, resume):
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


def test_the_log_is_cut_back_to_the_checkpoint(killed, resume, whole):
    log = killed / "metrics.jsonl"
    log.write_text(log.read_text()[:-40])  # in the midst of a line
    assert_same(resume().ok(), whole)


def test_what_the_log_lacks_of_before_the_checkpoint_is_said(killed, resume, whole):
    """A disk was full, and the run was killed before it could write what was missing."""
    log = killed / "metrics.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:5]))
    result = resume().ok()
    assert told_of(result) == ("from step 8", ["metrics.jsonl lacks 3 of these steps"])
    assert result.column("step") == [1, 2, 3, 4, 5, 9, 10, 11, 12] and weights_file(result) == weights_file(whole)


@pytest.mark.parametrize("place", [3, 100], ids=["at its beginning", "in its midst"])
def test_a_damaged_line_of_the_log_is_dropped_and_no_other(killed, resume, whole, place):
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

@pytest.fixture(scope="module")
def long_steps():
    """Steps of some tenths of a second, in which a signal falls between micro-batches."""
    return {"batch": 512, "micro_batch": 3, "dropout": 0.1, "steps": 4, "width": 64, "noise_every": 1, "restores": 3}


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_was_stopped_inside_a_batch_is_the_same_too(run, resume, long_steps, sent):
    reference = run.text("train", run="reference", **long_steps).ok()
    process = run.start("train", **long_steps)
    wait_for(lambda: lines_of(run) >= 1, process)
    time.sleep(0.4 * reference.metrics[1]["step_seconds"])
    process.send_signal(sent)
    process.communicate(timeout=60)
    assert process.returncode == 130
    steps, samples = map(int, re.fullmatch(r"step-(\d{8})-(\d+)", checkpoints_of(run.folder / "run")[-1].name).groups())
    assert 1 <= steps == lines_of(run) and 0 < samples < 512 and samples % 3 == 0
    result = resume("--json").ok()
    assert result.document["resumed_from"] == steps
    assert_same(result, reference)


# The same command line, first and ever after

@pytest.mark.parametrize("folder", ["missing", "empty", "no checkpoint yet"])
def test_without_a_checkpoint_it_begins_from_the_start_and_says_so(run, resume, whole, folder):
    if folder == "empty":
        (run.folder / "run").mkdir()
    if folder == "no checkpoint yet":
        shutil.rmtree(cut(whole.folder, run.folder / "run", log=2) / "checkpoints")
    result = resume(*job_words(run)).ok()
    assert re.fullmatch(r"there is no checkpoint in run yet: from the beginning", told_of(result)[0])
    assert_same(result, whole)


def test_without_a_checkpoint_and_without_data_both_are_missed(resume):
    resume().refused(2, "--run run", "no checkpoint", "--data")


@pytest.mark.parametrize("put", [lambda place: place.symlink_to("nowhere"), lambda place: place.write_text("in the way")],
                         ids=["a link that leads nowhere", "a file"])
def test_checkpoints_that_cannot_be_read_are_not_taken_for_none(killed, run, resume, put):
    words = job_words(run)
    shutil.rmtree(killed / "checkpoints")
    put(killed / "checkpoints")
    before = contents(killed)
    resume(*words).refused(5, "run/checkpoints")
    assert contents(killed) == before and (killed / "checkpoints").lstat()


def test_a_run_that_came_to_its_end_without_checkpoints_is_not_begun_anew(run, resume):
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


def test_the_same_command_line_goes_on_without_a_word_about_differences(killed, run, resume, whole):
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
    held = bytearray(2**28)  # memory that is not free any more
    result = resume(*words, "--steps", "24", "--schedule", "constant").ok()
    assert held is not None and told_of(result) == ("from step 12", ["steps was 12, is 24"])
    assert len(set(result.column("micro_batch"))) == 1
    whole = run.text("train", run="whole", steps=24, schedule="constant", micro_batch=first.metrics[0]["micro_batch"],
                     recompute="always" if first.metrics[0]["recompute"] else "never", **flags).ok()
    assert weights_file(result) == weights_file(whole)


def test_a_configuration_file_beside_it_counts_as_flags(killed, run, resume, whole):
    assert_same(resume("--config", whole.folder / "config.toml").ok(), whole)


# What may be another, with a note

@pytest.mark.parametrize("words", [["--micro-batch", "2"], ["--memory", "32MiB"], ["--threads", "2"]],
                         ids=lambda words: words[0][2:])
def test_another_cut_budget_or_number_of_threads_keeps_the_batch_and_says_that_bits_may_differ(killed, resume, whole, words):
    result = resume(*words).ok()
    notes = told_of(result)[1]
    assert notes and all("bits may differ" in note for note in notes)
    assert any(note.startswith(f"{words[0][2:]} was ") for note in notes), notes
    assert result.column("step") == list(range(1, 13)) and set(result.column("batch")) == {8}
    # 1e-4: rounding of fp32 sums of another order. Dropout is drawn by micro-batch: another cut, which another budget
    # may choose, draws others.
    bar = 1e-4 if words[0] == "--threads" else 0.05
    assert result.column("loss") == pytest.approx(whole.column("loss"), rel=bar)
    assert result.column("loss")[:8] == whole.column("loss")[:8]
    if words[0] == "--micro-batch":
        assert result.column("micro_batch") == [3] * 8 + [2] * 4


def test_another_cut_gives_the_same_updates_where_nothing_is_drawn(run, resume):
    reference = train(run, "reference", dropout=0).ok()
    cut(reference.folder, run.folder / "run")
    result = resume("--micro-batch", "1").ok()
    assert result.column("micro_batch") == [3] * 8 + [1] * 4
    assert result.column("loss") == pytest.approx(reference.column("loss"), rel=1e-4)


def test_a_run_that_was_stopped_inside_a_batch_may_go_on_in_another_cut(run, resume, long_steps):
    flags = long_steps | {"dropout": 0, "noise_every": 0}
    reference = run.text("train", run="reference", **flags).ok()
    process = run.start("train", **flags)
    wait_for(lambda: lines_of(run) >= 1, process)
    time.sleep(0.4 * reference.metrics[1]["step_seconds"])
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert checkpoints_of(run.folder / "run")[-1].name.count("-") == 2
    result = resume("--micro-batch", "5").ok()
    assert result.column("samples") == reference.column("samples") and result.column("weight") == reference.column("weight")
    assert result.column("loss") == pytest.approx(reference.column("loss"), rel=1e-4)


@pytest.mark.parametrize("words, said", [
    (["--lr", "0.002"], "lr was 0.001, is 0.002"), (["--clip", "0.5"], "clip was 1, is 0.5"),
    (["--weight-decay", "0.2"], "weight-decay was 0.1, is 0.2"), (["--schedule", "linear"], "schedule was cosine, is linear"),
    (["--steps", "14"], "steps was 12, is 14"), (["--samples", "100"], "samples"),
], ids=lambda words: words[0][2:] if isinstance(words, list) else "")
def test_another_length_or_rate_is_noted(killed, resume, whole, words, said):
    result = resume(*words).ok()
    notes = told_of(result)[1]
    assert said in "; ".join(notes) and not any("bits" in note for note in notes), notes
    assert result.column("loss")[:8] == whole.column("loss")[:8]
    assert len(result.metrics) == {"--steps": 14, "--samples": 13}.get(words[0], 12)
    if words[0] != "--clip":
        assert result.column("learning_rate")[8:12] != whole.column("learning_rate")[8:] or "decay" in words[0]


@pytest.mark.parametrize("was, now, gone", [
    ({"schedule": "cosine"}, "constant", "final-lr"), ({"schedule": "wsd", "decay": "3 steps"}, "linear", "decay"),
    ({"schedule": "polynomial", "power": 3}, "cosine", "power"),
], ids=lambda value: value if isinstance(value, str) else value["schedule"])
def test_what_was_of_the_schedule_before_is_left_out_with_another(run, resume, was, now, gone):
    run.text("train", steps=4, micro_batch=4, **was).ok()
    result = resume("--schedule", now, "--steps", "6").ok()
    assert f"schedule was {was['schedule']}, is {now}" in told_of(result)[1]
    assert result.column("step") == [1, 2, 3, 4, 5, 6]
    written = tomllib.loads((result.folder / "config.toml").read_text())
    assert written["schedule"] == now and gone not in written


def test_flags_that_are_about_the_log_or_checkpoints_need_no_note(killed, resume, whole):
    result = resume("--checkpoint-every", "1 steps", "--keep", "2").ok()
    assert told_of(result) == ("from step 8", [])
    assert weights_file(result) == weights_file(whole)
    assert [entry.name for entry in checkpoints_of(killed)] == ["step-00000011", "step-00000012"]


def test_the_same_data_at_another_path_is_the_same_data(killed, run, data, resume, whole):
    moved = run.folder / "moved.txt"
    moved.write_bytes(data.text.read_bytes())
    result = resume("--data", moved).ok()
    assert_same(result, whole)
    assert tomllib.loads((killed / "config.toml").read_text())["data"] == str(moved)


def test_data_that_is_gone_is_named(run, data, resume):
    moving = run.folder / "moving.txt"
    moving.write_bytes(data.text.read_bytes())
    reference = train(run, "reference", data=moving).ok()
    cut(reference.folder, run.folder / "run")
    moving.rename(run.folder / "moved.txt")
    resume().refused(5, "moving.txt")
    assert_same(resume("--data", "moved.txt").ok(), reference)


# What is another run

# A batch of 2 is below the recorded micro-batch.
OTHERS = [("width", 32, 48), ("layers", 1, 2), ("length", 16, 8), ("dropout", 0.1, 0.2), ("batch", 8, 16), ("batch", 8, 2),
          ("optimizer", "adamw", "sgd"), ("seed", 1, 2)]


@pytest.mark.parametrize("flag, was, now", OTHERS, ids=[f"{flag} {now}" for flag, _, now in OTHERS])
def test_another_model_batch_optimizer_or_seed_is_refused(killed, resume, flag, was, now):
    before = contents(killed)
    resume(f"--{flag}", now).refused(2, f"{flag} was {was}, is {now}", "--resume-changed")
    assert contents(killed) == before


def test_another_optimizer_is_refused_though_the_one_before_had_settings_of_its_own(run, resume):
    result = run.text("train", optimizer="sgd", momentum=0.8, nesterov=True, micro_batch=4).ok()
    before = contents(result.folder)
    resume("--optimizer", "adamw").refused(2, "optimizer was sgd, is adamw", "--resume-changed")
    assert contents(result.folder) == before


@pytest.mark.parametrize("change", [lambda raw: raw[:-1000], lambda raw: raw[:30_000] + b"#" + raw[30_001:],
                                    lambda raw: raw + b"more"], ids=["shorter", "a byte", "longer"])
def test_data_of_another_content_is_refused(killed, run, data, resume, change):
    other = run.folder / "other.txt"
    other.write_bytes(change(data.text.read_bytes()))
    before = contents(killed)
    resume("--data", other).refused(2, "data", "other.txt", "--resume-changed")
    assert contents(killed) == before


def test_images_of_another_content_are_refused(run, data, resume, broken_images):
    reference = train(run, "reference", "batch norm").ok()
    cut(reference.folder, run.folder / "run")
    resume("--data", broken_images("train-images-idx3-ubyte", lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]))).refused(
        2, "data", "--resume-changed")
    copy = shutil.copytree(data.images, run.folder / "copy")
    assert_same(resume("--data", copy).ok(), reference)


def test_every_difference_is_named_at_once(killed, run, resume):
    other = run.folder / "other.txt"
    other.write_bytes(b"something else " * 1000)
    resume("--seed", "2", "--batch", "16", "--width", "48", "--data", other).refused(
        2, "seed was 1, is 2", "batch was 8, is 16", "width was 32, is 48", "data")


def test_another_batch_schedule_is_refused(run, resume):
    reference = train(run, "reference", "batch schedule").ok()
    cut(reference.folder, run.folder / "run")
    resume("--batch-schedule", "4 at 0, 16 at 20 samples").refused(2, "batch-schedule was ", "--resume-changed")
    assert_same(resume().ok(), reference)


@pytest.mark.parametrize("words", [["--batch", "16"], ["--seed", "2"], ["--data", "other.txt"], ["--dropout", "0.2"]],
                         ids=lambda words: words[0][2:])
def test_resume_changed_takes_it_all_the_same_and_says_what(killed, run, resume, whole, words):
    (run.folder / "other.txt").write_bytes(b"to be or not to be, that is the question " * 100)
    result = resume(*words, "--resume-changed").ok()
    assert any(re.match(rf"(the )?{words[0][2:]} was .*: another run from here on", note) for note in told_of(result)[1])
    assert result.column("step") == list(range(1, 13)) and result.column("loss")[:8] == whole.column("loss")[:8]
    assert result.column("loss")[8:] != whole.column("loss")[8:]
    assert result.column("batch")[8:] == [16 if words[0] == "--batch" else 8] * 4


def test_weights_of_another_size_cannot_be_taken(killed, resume):
    before = contents(killed)
    resume("--width", "16", "--resume-changed").refused(5, "token_embedding.weight", "[256, 32]", "[256, 16]")
    assert contents(killed) == before


@pytest.mark.parametrize("was, now", [("batch", "group"), ("group", "batch")])
def test_weights_of_another_norm_cannot_be_taken(run, resume, was, now):
    result = run.images("train", norm=was, micro_batch=4).ok()
    before = contents(result.folder)
    resume("--norm", now, "--resume-changed").refused(5, "norm1.")
    assert contents(result.folder) == before


@pytest.mark.parametrize("was, now", [("adamw", "sgd"), ("sgd", "adamw")])
def test_another_optimizer_takes_the_weights_and_begins_with_a_state_of_its_own(run, resume, was, now):
    # Two snapshots of the guard have the state of the other optimizer, too.
    run.text("train", optimizer=was, micro_batch=4, steps=40).ok()
    shutil.copytree(run.folder / "run", run.folder / "same")
    same = run.in_folder("same", ["train", "--run", "same", "--resume", "--steps", "44"]).ok()
    result = resume("--optimizer", now, "--resume-changed", "--steps", "44").ok()
    notes = told_of(result)[1]
    assert f"optimizer was {was}, is {now}: another run from here on" in notes
    assert any("optimizer" in note and re.search("anew|afresh|beg[iu]n|start", note) for note in notes), notes
    # The loss of step 41 is that of the weights of step 40.
    assert result.column("loss")[:41] == same.column("loss")[:41] and result.column("loss")[41:] != same.column("loss")[41:]
    assert told_of(resume("--steps", "46").ok()) == ("from step 44", ["steps was 44, is 46"])


# Damage

def flip(raw):
    return raw[: len(raw) // 2] + bytes([raw[len(raw) // 2] ^ 1]) + raw[len(raw) // 2 + 1 :]


DAMAGES = {"a bit": flip, "cut": lambda raw: raw[: len(raw) // 2], "empty": lambda raw: b"", "missing": None}


def damage(file, how):
    if DAMAGES[how] is None:
        file.unlink()
    else:
        file.write_bytes(DAMAGES[how](file.read_bytes()))


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "generators.safetensors", "state.json",
                                  "manifest.json", "snapshot"])
def test_a_damaged_checkpoint_is_named_and_passed_over(killed, resume, whole, name, how):
    older, newest = checkpoints_of(killed)
    file = next(newest.glob("snapshot-*.safetensors")) if name == "snapshot" else newest / name
    damage(file, how)
    result = resume("--json").ok()
    assert result.document["resumed_from"] == 4
    assert re.search(rf"warning.*{newest.name}", result.stderr), result.stderr
    assert_same(result, whole)


def crc32c(raw):
    """RFC 3720, appendix B.4, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in raw:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def test_a_checkpoint_of_another_version_is_not_passed_over_for_an_older_one(killed, resume):
    manifest = checkpoints_of(killed)[-1] / "manifest.json"
    content, checksum = re.fullmatch(r'(.*),\n  "crc32c": "(.{8})"\n}\n', manifest.read_text(), re.DOTALL).groups()
    assert checksum == f"{crc32c(content.encode()):08x}" and content.count('"version": 1') == 1
    content = content.replace('"version": 1', '"version": 2')
    manifest.write_text(f'{content},\n  "crc32c": "{crc32c(content.encode()):08x}"\n}}\n')
    before = contents(killed)
    resume().refused(5, "step-00000008", "go on with the microbatch that wrote it")
    assert contents(killed) == before


def test_where_every_checkpoint_is_damaged_each_is_named(killed, resume):
    for checkpoint in checkpoints_of(killed):
        damage(checkpoint / "weights.safetensors", "a bit")
    before = contents(killed)
    resume().refused(5, *(checkpoint.name for checkpoint in checkpoints_of(killed)))
    assert contents(killed) == before


def test_a_damaged_checkpoint_is_not_kept_in_the_place_of_a_good_one(killed, resume):
    for checkpoint in checkpoints_of(killed)[-1:]:
        damage(checkpoint / "weights.safetensors", "a bit")
    resume("--keep", "2").ok()
    assert [entry.name for entry in checkpoints_of(killed)] == ["step-00000008", "step-00000012"]
    damage(killed / "checkpoints" / "step-00000012" / "state.json", "empty")
    assert resume("--json").ok().document["resumed_from"] == 8


# Runs that are done

def test_resuming_a_run_that_is_done_writes_what_it_gives_and_says_so(run, whole, resume):
    folder = shutil.copytree(whole.folder, run.folder / "run")
    for name in ("model.safetensors", "report.html", "summary.json"):
        (folder / name).unlink()
    result = resume("--json").ok()
    assert "done" in result.stderr and result.document["resumed_from"] == 12 == result.document["steps"]
    assert_same(result, whole)
    assert (folder / "report.html").stat().st_size > 50_000 and (folder / "summary.json").exists()
    assert result.document["held_out_loss"] == json.loads((whole.folder / "summary.json").read_text())["held_out_loss"]


def test_a_run_that_is_done_goes_on_with_a_larger_length(run, resume):
    longer = train(run, "longer", schedule="constant", steps=20).ok()
    train(run, "run", schedule="constant").ok()
    result = resume("--steps", "20").ok()
    assert_same(result, longer)
    assert tomllib.loads((result.folder / "config.toml").read_text())["steps"] == 20


def test_with_a_length_that_is_behind_already_it_is_done(run, whole, resume):
    folder = shutil.copytree(whole.folder, run.folder / "run")
    (folder / "model.safetensors").unlink()
    result = resume("--steps", "5").ok()
    assert told_of(result) == ("from step 12, its last: to go on, give it a greater length", ["steps was 12, is 5"])
    assert weights_file(result) == weights_file(whole) and result.column("step") == list(range(1, 13))


# What else is in the folder

def test_the_configuration_is_that_of_the_resumed_run_and_gives_it_again(run, killed, whole, resume):
    before = (whole.folder / "config.toml").read_text()
    resume().ok()
    assert (killed / "config.toml").read_text() == before and "resume" not in before
    again = run.in_folder("again", ["train", "--config", "run/config.toml", "--run", "again"]).ok()
    assert_same(again, whole)


def test_the_configuration_has_the_flags_given_beside_resume(killed, resume):
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

def test_a_run_that_went_back_goes_back_to_the_same_where_it_is_resumed(run, resume):
    flags = CLIMB | {"lr": 20, "warmup": "1000 steps", "steps": 240, "restores": 20, "checkpoint_every": "30 steps", "keep": 9}
    reference = run.text("train", run="reference", **flags).ok()
    assert sum(line["went_back_to"] is not None for line in reference.metrics) >= 2
    places = [(line["step"], line["went_back_to"]) for line in reference.metrics if line["went_back_to"] is not None]
    for after in (90, 120, 150):
        shutil.rmtree(run.folder / "run", ignore_errors=True)
        cut(reference.folder, run.folder / "run", after, log=after + 5)
        result = resume("--json").ok()
        assert [(line["step"], line["went_back_to"]) for line in result.metrics if line["went_back_to"] is not None] == places
        assert result.document["restores"] == len(places)
        assert_same(result, reference)
