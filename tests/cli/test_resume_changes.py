"""Resumed with changed settings: what is reported, what is refused, what starts again."""

import re
import shutil
import signal
import tomllib

import pytest

from conftest import stop_in_a_batch, weights_file
from resuming import (  # noqa: F401
    assert_same, checkpoints_of, contents, cut, killed, long_steps, resume, told_of, train, whole)

# What may change, with a note

@pytest.mark.parametrize("words", [["--micro-batch", "2"], ["--memory", "32MiB"], ["--threads", "2"]],
                         ids=lambda words: words[0][2:])
def test_another_split_budget_or_number_of_threads_keeps_the_batch_and_says_that_bits_may_differ(killed, resume, whole, words):
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


def test_another_split_gives_the_same_updates_without_random_draws(run, resume):
    reference = train(run, "reference", dropout=0).ok()
    cut(reference.folder, run.folder / "run")
    result = resume("--micro-batch", "1").ok()
    assert result.column("micro_batch") == [3] * 8 + [1] * 4
    assert result.column("loss") == pytest.approx(reference.column("loss"), rel=1e-4)


def test_a_run_interrupted_inside_a_batch_may_resume_with_another_split(run, gate, resume, long_steps):
    flags = long_steps | {"dropout": 0, "noise_every": 0}
    reference = run.text("train", run="reference", **flags).ok()
    stop_in_a_batch(run, gate, signal.SIGTERM, after_steps=1, micro_batches=10, **flags)
    assert checkpoints_of(run.folder / "run")[-1].name == "step-00000001-30"
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


@pytest.mark.parametrize("words", [["--steps", "24"], ["--lr", "0.002"], ["--schedule", "constant"],
                                   ["--warmup", "10 steps"]], ids=lambda words: words[0][2:])
def test_a_change_of_the_rate_is_reported(killed, resume, words):
    result = resume(*words).ok()
    before, after = result.column("learning_rate")[7:9]
    assert told_of(result)[1][-1] == f"the learning rate goes from {before:.4g} to {after:.4g}"


def test_an_unchanged_rate_is_not_reported(run, resume):
    run.text("train", steps=4, micro_batch=4, schedule="constant").ok()
    assert told_of(resume("--steps", "6").ok()) == ("from step 4", ["steps was 4, is 6"])


@pytest.mark.parametrize("was, now, gone", [
    ({"schedule": "cosine"}, "constant", "final-lr"), ({"schedule": "wsd", "decay": "3 steps"}, "linear", "decay"),
    ({"schedule": "polynomial", "power": 3}, "cosine", "power"),
], ids=lambda value: value if isinstance(value, str) else value["schedule"])
def test_settings_of_a_replaced_schedule_are_dropped(run, resume, was, now, gone):
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


def test_missing_data_at_resume_is_named(run, data, resume):
    moving = run.folder / "moving.txt"
    moving.write_bytes(data.text.read_bytes())
    reference = train(run, "reference", data=moving).ok()
    cut(reference.folder, run.folder / "run")
    moving.rename(run.folder / "moved.txt")
    resume().refused(5, "moving.txt")
    assert_same(resume("--data", "moved.txt").ok(), reference)


# What makes a different run

# A batch of 2 is below the recorded micro-batch.
OTHERS = [("width", 32, 48), ("layers", 1, 2), ("length", 16, 8), ("dropout", 0.1, 0.2), ("batch", 8, 16), ("batch", 8, 2),
          ("optimizer", "adamw", "sgd"), ("seed", 1, 2)]


@pytest.mark.parametrize("flag, was, now", OTHERS, ids=[f"{flag} {now}" for flag, _, now in OTHERS])
def test_another_model_batch_optimizer_or_seed_is_refused(killed, resume, flag, was, now):
    before = contents(killed)
    resume(f"--{flag}", now).refused(2, f"{flag} was {was}, is {now}", "--resume-changed")
    assert contents(killed) == before


def test_another_optimizer_is_refused_although_the_previous_one_had_its_own_settings(run, resume):
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
def test_resume_changed_accepts_differences_and_reports_them(killed, run, resume, whole, words):
    (run.folder / "other.txt").write_bytes(b"to be or not to be, that is the question " * 100)
    result = resume(*words, "--resume-changed").ok()
    assert any(re.match(rf"(the )?{words[0][2:]} was .*: a different run from here on", note) for note in told_of(result)[1])
    assert result.column("step") == list(range(1, 13)) and result.column("loss")[:8] == whole.column("loss")[:8]
    assert result.column("loss")[8:] != whole.column("loss")[8:]
    assert result.column("batch")[8:] == [16 if words[0] == "--batch" else 8] * 4


def test_weights_of_another_size_are_refused(killed, resume):
    before = contents(killed)
    resume("--width", "16", "--resume-changed").refused(5, "the checkpoint of step 8: parameter blocks.0.", "[32]", "[16]")
    assert contents(killed) == before


@pytest.mark.parametrize("was, now", [("batch", "group"), ("group", "batch")])
def test_weights_of_another_norm_are_refused(run, resume, was, now):
    result = run.images("train", norm=was, micro_batch=4).ok()
    before = contents(result.folder)
    resume("--norm", now, "--resume-changed").refused(5, "norm1.")
    assert contents(result.folder) == before


@pytest.mark.parametrize("was, now", [("adamw", "sgd"), ("sgd", "adamw")])
def test_another_optimizer_keeps_the_weights_and_starts_with_new_state(run, resume, was, now):
    # Two snapshots of the guard have the state of the other optimizer, too.
    run.text("train", optimizer=was, micro_batch=4, steps=40).ok()
    shutil.copytree(run.folder / "run", run.folder / "same")
    same = run.in_folder("same", ["train", "--run", "same", "--resume", "--steps", "44"]).ok()
    result = resume("--optimizer", now, "--resume-changed", "--steps", "44").ok()
    notes = told_of(result)[1]
    assert f"optimizer was {was}, is {now}: a different run from here on" in notes
    assert any("the optimizer starts with new state" in note for note in notes), notes
    # The loss of step 41 is that of the weights of step 40.
    assert result.column("loss")[:41] == same.column("loss")[:41] and result.column("loss")[41:] != same.column("loss")[41:]
    first, notes = told_of(resume("--steps", "46").ok())
    assert first == "from step 44" and notes[:-1] == ["steps was 44, is 46"] and "learning rate" in notes[-1]
