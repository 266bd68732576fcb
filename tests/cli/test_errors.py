"""Bad input of every kind: one clear line, the right exit code, and no files left behind."""

import struct

import pytest

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.fixture
def refused(run):
    """Train the tiny text job with these flags: refused, and no run folder made."""

    def check(code, *words, job="text", **flags):
        getattr(run, job)("train", **flags).refused(code, *words)
        assert not (run.folder / "run").exists() and not (run.folder / "runs").exists()

    return check


# The command's words

@pytest.mark.parametrize("words, said", [
    ([], ["train, compare, advise, plan, report or doctor"]), (["bogus"], ["'bogus'"]), (["trian"], ["'trian'", "train"]),
    (["compair"], ["compare"]),
    (["train", "--bach", "8"], ["--bach", "--batch"]), (["train", "--micro_batch=8"], ["--micro-batch"]),
    (["plan", "--memry", "1MiB"], ["--memory"]), (["compare", "--shedule", "wsd"], ["--schedule"]),
    (["doctor", "--jsn"], ["--json"]), (["train", "extra"], ["extra"]),
    (["train", "--data"], ["--data"]), (["train", "-b", "8"], ["-b"]), (["--json", "train"], ["--json"]),
    (["--verison"], ["--version"]), (["doctor", "--run", "x"], ["--run"]),
    (["compare", "--no-verify"], ["--no-verify"]),
])
def test_mistyped_words_are_named_with_similar_ones(run, words, said):
    run(*words).refused(2, *said)


@pytest.mark.parametrize("word", ["--xyzzy", "--versoin"])
def test_a_word_that_is_similar_to_none_gets_no_suggestion(run, word):
    assert "did you mean" not in run("train", word).refused(2, word).stderr


def test_a_flag_of_another_command_gets_no_wrong_suggestion(run, data):
    assert "--seed" not in run("plan", "--data", data.text, "--steps", "3").refused(2, "--steps").stderr


def test_a_flag_given_twice_is_refused_in_plain_words(run, data):
    result = run("train", "--data", data.text, "--batch", "8", "--batch", "9").refused(2, "--batch", "twice")
    assert "At Most" not in result.stderr


@pytest.mark.parametrize("flag", ["lr", "clip", "steps", "samples", "tokens", "run", "data", "model", "norm", "memory",
                                  "config", "power", "momentum", "weight-decay", "final-lr", "decay", "dropout",
                                  "warmup", "schedule", "optimizer", "seed", "threads", "batch", "micro-batch",
                                  "recompute", "batch-schedule", "restores", "noise-every"])
def test_a_flag_with_an_empty_value_is_refused(run, flag):
    """`--lr "$RATE"` in a script where RATE is not set must not train with something else."""
    flags = {"steps": None, "run": None} | {flag: ""}
    run.text("train", **flags).refused(2, f"--{flag}")


@pytest.mark.parametrize("words, said", [
    (["--josn"], "unknown global option --josn"), (["trian"], "unknown command 'trian'; did you mean 'train'?"),
    (["train", "--bach", "8"], "train has no option --bach; did you mean '--batch'?"),
    (["doctor", "--seed", "1"], "doctor has no option --seed; it is an option of train, compare, advise or plan"),
])
def test_a_mistyped_word_is_explained_in_one_sentence(run, words, said):
    assert run(*words).refused(2).stderr.splitlines()[0] == f"microbatch: {said}"


def test_a_batch_that_is_listed_twice_is_named(run):
    run.text("compare", batches="8, 16, 8").refused(2, "--batches", "8 is listed twice")


# Numbers

@pytest.mark.parametrize("value", ["0", "-1", "abc", "1.5", "9223372036854775807", "9223372036854775808", "1e3", "nan",
                                   "8x", "99999999999999999999999999", "0x10", "8 8", "١"])
def test_a_batch_must_be_a_whole_number_above_zero(refused, value):
    refused(2, "--batch", batch=value)


def test_a_micro_batch_must_be_a_whole_number_above_zero(refused):
    for value in ("0", "-1", "abc", "1.5", "9223372036854775807", "9223372036854775808"):
        refused(2, "--micro-batch", micro_batch=value)


def test_a_micro_batch_is_no_larger_than_the_batch(refused):
    refused(2, "--micro-batch 9", "--batch 8", micro_batch=9)


@pytest.mark.parametrize("flag", ["layers", "heads", "width", "length", "threads"])
def test_sizes_of_the_model_must_be_sensible(refused, flag):
    for value in ("-1", "x", "99999999999999999999") + (("0",) if flag != "threads" else ()):
        refused(2, flag, **{flag: value})
    if flag != "length":
        refused(2, flag, **{flag: "1000000000000"})
    else:
        refused(5, "1000000000000", length="1000000000000")


def test_the_length_of_a_run_must_be_a_count(refused):
    for value in ("0", "-1", "x", "1.5", "5kk", "99999999999999999999"):
        refused(2, "--steps", steps=value)
    for value in ("0", "x"):
        refused(2, "--samples", steps=None, samples=value)
        refused(2, "--tokens", steps=None, tokens=value)


@pytest.mark.parametrize("flag, values", [
    ("lr", ["nan", "-1", "inf", "abc", "1e400"]), ("clip", ["0", "nan", "-1", "abc"]),
    ("weight_decay", ["nan", "-1", "inf", "x"]), ("final_lr", ["nan", "-1", "2", "x"]),
    ("dropout", ["nan", "-0.1", "1", "x"]), ("seed", ["-1", "x", "1.5", "18446744073709551616"]),
])
def test_numbers_outside_their_range_are_refused(run, flag, values):
    named = {"final_lr": "learning rate at the end"}
    for value in values:
        name = "" if value in ("x", "abc") else named.get(flag, "")
        run.text("train", **{flag: value}).refused(2, name or f"--{flag.replace('_', '-')}")


def test_a_number_outside_its_range_is_told_what_it_must_be(run):
    for flags, said in [({"batch": 0}, "--batch 0: must be from 1 to 2^31"), ({"clip": -1}, "--clip -1: must be above 0"),
                        ({"reference_batch": 0}, "--reference-batch 0: must be at least 1"),
                        ({"optimizer": "adam"}, "--optimizer adam: must be adamw or sgd"),
                        ({"lr": "fast"}, '--lr: "fast" is not a number')]:
        assert run.text("train", **flags).refused(2).stderr.splitlines()[0] == f"microbatch: {said}"


def test_settings_of_one_optimizer_or_schedule_have_ranges_too(refused):
    for value in ("nan", "-0.1", "1"):
        refused(2, "--momentum", optimizer="sgd", momentum=value)
    for value in ("nan", "0", "inf"):
        refused(2, "power", schedule="polynomial", power=value)


@pytest.mark.parametrize("value", ["0", "-1GiB", "2XB", "nan", "inf", "MiB", "10MiB..", "0MiB", "1,5GiB", "1e3MiB",
                                   "9999999999999999999999GiB", "99999999999TiB"])
def test_a_wrong_memory_size_is_refused(refused, value):
    refused(2, "--memory", f'"{value}"', memory=value)


@pytest.mark.parametrize("command", ["plan", "compare"])
def test_the_other_commands_refuse_the_same(run, command):
    for flag, value in (("memory", "2XB"), ("batch", 0), ("lr", "nan"), ("micro_batch", 9), ("model", "gpt3")):
        run.text(command, **{flag: value}).refused(2, f"--{flag.replace('_', '-')}")


def test_a_wrong_interval_is_refused(refused):
    for value in ("5", "-1 steps", "100 furlongs", "steps", "1.5 steps"):
        refused(2, "--warmup", warmup=value)


# Names and contradictions

def test_unknown_names_are_refused_with_those_that_exist(refused):
    refused(2, "--model gpt3", "gpt-tiny", "gpt-small", "gpt2", "llama-1m", "llama-15m", "resnet", "mlp", model="gpt3")
    refused(2, "--schedule", "cosin", "constant", "linear", "cosine", "wsd", "polynomial", schedule="cosin")
    refused(2, "--optimizer", "adam", "adamw", "sgd", optimizer="adam")
    refused(2, "--norm", "grop", "batch", "group", job="images", norm="grop")


@pytest.mark.parametrize("flags, words", [
    ({"tokens": 100}, ["--tokens", "--steps"]), ({"samples": 100}, ["--samples", "--steps"]),
    ({"steps": None, "samples": 1, "tokens": 2}, ["--tokens", "--samples"]),
    ({"nesterov": True}, ["--nesterov", "adamw"]), ({"momentum": 0.9}, ["--momentum", "adamw"]),
    ({"norm": "group"}, ["--norm", "gpt"]), ({"decay": "1 steps"}, ["--decay", "cosine"]),
    ({"power": 3}, ["--power", "cosine"]), ({"schedule": "constant", "final_lr": 1e-4}, ["--final-lr", "constant"]),
    ({"warmup": "100 steps"}, ["warmup", "100 steps", "2 steps"]), ({"warmup": "1M tokens"}, ["warmup"]),
    ({"schedule": "constant", "warmup": "3 steps"}, ["constant", "warmup (", "shorten"]),
    ({"schedule": "wsd", "decay": "3 steps"}, ["decay", "3 steps"]), ({"heads": 3}, ["width 32", "heads 3"]),
])
def test_flags_that_contradict_one_another_are_refused(refused, flags, words):
    refused(2, *words, **flags)


def test_flags_of_a_gpt_do_not_apply_to_images(refused):
    for flag, value in (("heads", 2), ("length", 16), ("dropout", 0.1)):
        refused(2, f"--{flag}", "resnet", job="images", **{flag: value})
    refused(2, "--norm", "mlp", job="images", model="mlp")
    refused(2, "gpt-tiny", "images", job="images", model="gpt-tiny", norm=None)
    refused(2, "width 7", "8", job="images", width=7)


@pytest.mark.parametrize("model", ["resnet", "mlp"])
def test_an_image_model_does_not_accept_text(refused, model):
    refused(2, model, "text", model=model, heads=None, length=None)


# Data

def test_missing_data_is_named(run, refused):
    run("train").refused(2, "--data")
    refused(5, "nothere.txt", data="nothere.txt")
    refused(5, "/dev/null", data="/dev/null")


def test_empty_text_is_bad_data(run, refused):
    (run.folder / "empty.txt").write_bytes(b"")
    (run.folder / "two.txt").write_bytes(b"hi")
    (run.folder / "folder").mkdir()
    refused(5, "empty.txt", "empty", data="empty.txt")
    refused(5, "two.txt", "2 tokens", "16", data="two.txt")
    refused(5, "folder", "no text", data="folder")


def test_corrupted_token_files_are_bad_data(run, refused, data):
    whole, llmc = data.tokens.read_bytes(), data.tokens_llmc.read_bytes()
    for name, content in (("empty", b""), ("odd", whole[:1001]), ("truncated", llmc[:-500]), ("cut", llmc[:300])):
        (run.folder / f"{name}.bin").write_bytes(content)
        refused(5, f"{name}.bin", data=f"{name}.bin")


@pytest.mark.parametrize("name, change, words", [
    (IMAGES, lambda raw: b"\1\2\3\4" + raw[4:], ["magic number", "0x01020304"]),
    (LABELS, lambda raw: raw[:4] + struct.pack(">I", 200) + raw[8:208], ["300 images", "200 labels"]),
    (IMAGES, lambda raw: raw[:1000], ["truncated"]), (IMAGES, lambda raw: raw[:6], ["truncated"]),
    (LABELS, lambda raw: raw[:-1], ["truncated"]), (IMAGES, lambda raw: b"", ["empty"]),
    (LABELS, lambda raw: None, [LABELS]), (IMAGES, lambda raw: None, [IMAGES]),
    (IMAGES, lambda raw: raw[:4] + b"\xff" * 12 + raw[16:], ["header"]),
    (IMAGES, lambda raw: raw[:4] + struct.pack(">III", 0, 28, 28), ["0"]),
], ids=["magic", "counts differ", "truncated", "half a header", "labels truncated", "empty", "no labels", "no images",
        "huge", "none"])
def test_corrupted_images_are_bad_data(refused, broken_images, name, change, words):
    refused(5, "broken", *words, job="images", data=broken_images(name, change))


def test_a_corrupted_gzip_is_bad_data(refused, data, tmp_path):
    folder = tmp_path / "zipped"
    folder.mkdir()
    for file in data.images_gz.iterdir():
        (folder / file.name).write_bytes(file.read_bytes()[:5000] if IMAGES in file.name else file.read_bytes())
    refused(5, IMAGES + ".gz", job="images", data=folder)


# The run folder

def test_an_existing_run_is_not_overwritten(run):
    before = run.text("train").ok()
    old = {file: file.read_bytes() for file in before.folder.rglob("*") if file.is_file()}
    run.text("train", seed=2).refused(2, "run", "already")
    assert {file: file.read_bytes() for file in before.folder.rglob("*") if file.is_file()} == old


@pytest.mark.parametrize("name", ["model.safetensors", "config.toml", "metrics.jsonl", "report.html", "summary.json"])
def test_a_folder_with_any_file_of_a_run_is_not_overwritten(run, name):
    (run.folder / "run").mkdir()
    (run.folder / "run" / name).write_text("mine")
    run.text("train").refused(2, "run", "already")
    assert [(file.name, file.read_text()) for file in (run.folder / "run").iterdir()] == [(name, "mine")]


@pytest.mark.parametrize("name", ["report.html", "summary.json", "model.safetensors"])
def test_a_first_launch_with_resume_overwrites_no_file_of_another(run, name):
    (run.folder / "run").mkdir()
    (run.folder / "run" / name).write_text("mine")
    run.text("train", resume=True).refused(2, "run: there is no checkpoint to resume from", name)
    assert [(file.name, file.read_text()) for file in (run.folder / "run").iterdir()] == [(name, "mine")]


def test_a_page_of_a_run_that_was_killed_before_its_first_checkpoint_is_its_own(run):
    first = run.text("train", no_checkpoints=True).ok()
    (first.folder / "model.safetensors").unlink()
    assert run.text("train", resume=True).ok().column("step") == [1, 2]


def test_a_folder_that_cannot_be_created_is_named(run):
    (run.folder / "file").write_text("in the way")
    for name in ("file", "file/below", "/proc/nothing"):
        run.text("train", run=name).refused(6, name)


def test_an_empty_folder_is_accepted(run):
    (run.folder / "run").mkdir()
    run.text("train").ok()


# The budget

@pytest.mark.parametrize("command", ["train", "plan", "compare"])
def test_a_budget_below_the_model_does_not_fit_and_says_what_is_needed(run, command):
    for memory in ("5KiB", "300KiB"):
        run.text(command, memory=memory).misfit("micro-batch of 1 sample", f"budget of {memory[:-3]} KiB")
    run.text(command, memory="100").misfit("micro-batch of 1 sample", "budget of 100 B")
    assert list(run.folder.iterdir()) == []


@pytest.mark.parametrize("command", ["train", "plan", "compare"])
def test_a_given_micro_batch_that_does_not_fit_is_refused(run, command):
    run.text(command, batch=64, micro_batch=64, memory="2MiB").misfit("a smaller micro-batch", "micro-batch of 64", "budget of 2 MiB")


def test_a_run_that_did_not_fit_can_be_tried_again_under_its_name(run):
    run.text("train", batch=64, micro_batch=64, memory="2MiB").misfit()
    run.text("train", batch=64, memory="2MiB").ok()


def test_a_batch_whose_data_exceeds_the_budget_is_named_as_the_cause(run):
    error = run.text("train", batch=1_000_000, memory="4MiB").refused(3, "4 MiB").stderr
    assert "--batch" in error.replace("--micro-batch", "") and "micro-batch of 1 sample" not in error
