"""The TOML file: flags override it, the file of a run repeats the run, and errors in it are named."""

import pytest
import tomllib

TOML = 'data = "{data}"\nlayers = 1\nheads = 2\nwidth = 32\nlength = 16\nthreads = 1\nmemory = "64MiB"\n'


@pytest.fixture
def config(run, data):
    """Write a TOML file of the tiny job and the given lines, then train by it."""

    def trained(lines, *words, base=TOML):
        (run.folder / "job.toml").write_text(base.format(data=data.text) + lines)
        return run("train", "--config", "job.toml", *words)

    return trained


def test_keys_are_the_flags(config):
    result = config('batch = 4\nmicro-batch = 2\nsteps = 3\nrun = "run"\nno-verify = true\n').ok()
    assert result.column("samples") == [4, 8, 12] and set(result.column("micro_batch")) == {2}
    assert "verify" not in result.stdout


def test_flags_win_over_the_file(config):
    result = config("batch = 4\nsteps = 3\nlr = 0.5\n", "--batch", "6", "--lr", "0.25", "--run", "run").ok()
    assert result.column("samples") == [6, 12, 18]
    assert result.metrics[0]["learning_rate"] == 0.25


def test_a_length_flag_replaces_a_length_in_another_unit_from_the_file(config):
    assert config("batch = 8\nsteps = 2\n", "--tokens", "512", "--run", "run").ok().column("tokens")[-1] == 512


def test_numbers_may_be_written_as_on_the_command_line(config):
    result = config('batch = 8\nsamples = "1k"\nwarmup = "100 samples"\nrun = "run"\n').ok()
    assert result.column("samples")[-1] == 1000


def test_plan_and_compare_read_the_same_file(run, config):
    config("batch = 8\n", "--steps", "1", "--run", "run").ok()
    assert run("plan", "--config", "job.toml", "--json").ok().document["batch"] == 8
    assert run("compare", "--config", "job.toml", "--json", "--samples", "16").ok().document["samples"] == 16


@pytest.mark.parametrize("job, flags", [
    ("text", {}),
    ("text", {"schedule": "wsd", "warmup": "2 steps", "decay": "2 steps", "final_lr": 1e-4, "steps": 6, "seed": 7}),
    ("text", {"schedule": "polynomial", "power": 3, "dropout": 0.1, "tokens": 700, "steps": None}),
    ("images", {"optimizer": "sgd", "nesterov": True, "momentum": 0.8, "weight_decay": 0.01, "clip": "inf"}),
    ("images", {"norm": "batch", "no_verify": True, "samples": 20, "steps": None, "lr": 0.1 + 0.2}),
], ids=["gpt", "wsd", "polynomial", "nesterov", "batch norm"])
def test_the_config_that_a_run_wrote_gives_the_same_run_again(run, job, flags):
    first = getattr(run, job)("train", run="first", **flags).ok()
    again = run("train", "--config", "first/config.toml", "--run", "run").ok()
    for name in ("loss", "gradient_norm", "learning_rate", "samples", "micro_batch"):
        assert first.column(name) == again.column(name)
    assert (first.folder / "model.safetensors").read_bytes() == (again.folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("seed", [0, 2**63 - 1, 2**63, 2**64 - 1])
def test_a_seed_has_64_bits_in_the_config_in_checkpoints_and_in_the_run(run, seed):
    first = run.text("train", run="first", seed=seed, steps=4, dropout=0.1).ok()
    again = run("train", "--config", "first/config.toml", "--run", "run").ok()
    assert first.column("loss") == again.column("loss")
    text = tomllib.loads((first.folder / "config.toml").read_text())["seed"]
    assert int(text) == seed and isinstance(text, int if seed < 2**63 else str)
    resumed = run("train", "--run", "run", "--resume", "--steps", "6").ok()
    assert len(resumed.metrics) == 6
    run("train", "--run", "run", "--resume", "--seed", (seed + 1) % 2**64).refused(2, f"seed was {seed}, is ")


def test_seeds_beyond_63_bits_differ(run):
    losses = [run.text("train", run=f"s{seed}", seed=seed).ok().column("loss") for seed in (2**63, 2**63 + 1, 1)]
    assert losses[0] != losses[1] != losses[2]


def test_the_config_that_a_run_wrote_is_resolved(run, data):
    result = run.text("train", schedule="linear", warmup="1 step").ok()
    written = tomllib.loads((result.folder / "config.toml").read_text())
    assert written["data"] == str(data.text) and written["model"] == "gpt-tiny"
    assert written["micro-batch"] == result.metrics[0]["micro_batch"]  # what auto chose
    assert written["lr"] == 0.001 and written["clip"] == 1 and written["seed"] == 1  # defaults, too
    assert (written["schedule"], written["warmup"].split()[0], written["steps"]) == ("linear", "1", 2)


def test_the_config_names_data_by_a_path_that_works_from_anywhere(run, data):
    odd = run.folder / "it's \"odd\" \\n é.txt"
    odd.write_bytes(data.text.read_bytes())
    run.text("train", data=odd.name).ok()
    (run.folder / "elsewhere").mkdir()
    elsewhere = type(run)(run.folder / "elsewhere", data)
    again = elsewhere("train", "--config", "../run/config.toml", "--run", "run").ok()
    assert tomllib.loads((again.folder / "config.toml").read_text())["data"] == str(odd)


@pytest.mark.parametrize("key, nearest", [("batc", "batch"), ("micro_batch", "micro-batch"), ("learning-rate", None),
                                          ("optimiser", "optimizer"), ("Steps", "steps"), ("sead", "seed")])
def test_an_unknown_key_is_refused_with_the_nearest_that_exists(config, key, nearest):
    result = config(f'{key} = 1\nrun = "run"\n').refused(2, "job.toml", "line 8", f"'{key}'")
    assert (f"'{nearest}'" in result.stderr) if nearest else ("did you mean" not in result.stderr)


@pytest.mark.parametrize("lines, line", [
    ("batch = \n", 8), ("batch = 1\nsteps =\n", 9), ("batch = 'x\n", 8), ("batch 8\n", 8), ("[unclosed\n", 8),
    ("batch = 8\nbatch = 9\n", 9), ("batch = 9223372036854775808\n", 8), ("\n\n= 3\n", 10),
])
def test_a_syntax_error_is_named_by_file_and_line(config, lines, line):
    config(lines, "--run", "run").refused(2, "job.toml", f"line {line}")


@pytest.mark.parametrize("line, key", [
    ("batch = true", "batch"), ("batch = [8]", "batch"), ("batch = 8.5", "batch"), ('batch = "x"', "batch"),
    ("batch = 2024-01-01", "batch"), ("batch = {a = 1}", "batch"), ("lr = true", "lr"),
    ('lr = "x"', "lr"), ('clip = ""', "clip"), ("steps = 0", "steps"), ("seed = 1.5", "seed"),
    ('micro-batch = "many"', "micro-batch"), ("warmup = 5", "warmup"), ("warmup = true", "warmup"),
    ("model = 3", "model"), ("[model]\nlayers = 3", "model"), ("run = [1]", "run"),
])
def test_a_value_of_the_wrong_type_is_refused(config, line, key):
    config(line + "\n").refused(2, key)


@pytest.mark.parametrize("line", ["memory = true", 'memory = "2XB"', "memory = -1", "memory = nan"])
def test_a_wrong_memory_is_refused(run, data, line):
    (run.folder / "job.toml").write_text(f'data = "{data.text}"\n{line}\n')
    run("train", "--config", "job.toml").refused(2, "memory")


@pytest.mark.parametrize("line", ["nesterov", "no-verify", "json"])
def test_a_switch_wants_true_or_false(config, line):
    config(f'{line} = "maybe"\n').refused(2, line, "true")


@pytest.mark.parametrize("value", ["3", "true", '["a.txt"]'])
def test_data_that_is_no_string_is_a_wrong_configuration(run, value):
    (run.folder / "job.toml").write_text(f"data = {value}\n")
    run("train", "--config", "job.toml").refused(2, "data")


def test_a_contradiction_inside_the_file_is_refused(config):
    config("steps = 2\ntokens = 200\n").refused(2, "tokens", "steps")
    config('norm = "batch"\n').refused(2, "norm", "gpt")


def test_a_missing_file_is_named(run):
    run("train", "--config", "nothere.toml").refused(2, "--config", "nothere.toml")
    run("plan", "--config", "nothere.toml").refused(2, "--config", "nothere.toml")


def test_a_folder_is_not_a_config(run):
    (run.folder / "folder").mkdir()
    run("train", "--config", "folder").refused(2, "--config", "folder")


def test_a_file_that_is_not_text_is_refused(run):
    (run.folder / "job.toml").write_bytes(b"\x00\xff\xfe" * 100)
    run("train", "--config", "job.toml").refused(2, "job.toml", "line 1")


def test_an_empty_file_changes_nothing(run):
    (run.folder / "empty.toml").write_text("")
    run.text("train", config="empty.toml").ok()
