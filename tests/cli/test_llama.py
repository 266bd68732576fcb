"""A llama goes wherever a gpt goes."""

import tomllib

import pytest

from conftest import weights_file
from resuming import assert_same, cut, resume, train  # noqa: F401

LLAMA = {"model": "llama-1m"}
SIZES = {"layers": 1, "heads": 2, "kv-heads": 2, "width": 32, "inner": 96, "length": 16}


@pytest.fixture
def llama(run):
    """Runs a command on a tiny llama."""
    return lambda command, **flags: run.text(command, **LLAMA | flags)


def test_it_trains_and_records_its_sizes(llama):
    result = llama("train", steps=40).ok()
    assert set(result.column("applied")) == {True}
    assert result.metrics[-1]["loss"] < result.metrics[0]["loss"] - 0.5
    config = tomllib.loads((result.folder / "config.toml").read_text())
    assert {name: config[name] for name in SIZES} == SIZES and "norm" not in config and "dropout" not in config
    assert "llama-1m" in result.stdout and "2 heads, 2 of keys and values" in result.stdout


def test_its_weights_have_hugging_faces_names_and_the_sizes_that_were_asked_for(llama):
    weights = llama("train", layers=2, heads=4, kv_heads=1, inner=40).ok().weights
    assert len(weights) == 2 + 2 * 9
    shapes = {name: shape for name, (shape, _) in weights.items()}
    assert shapes["model.embed_tokens.weight"] == [256, 32]
    assert shapes["model.layers.1.self_attn.k_proj.weight"] == [8, 32]
    assert shapes["model.layers.0.mlp.up_proj.weight"] == [40, 32]
    assert shapes["model.norm.weight"] == [32]


def test_the_mlp_follows_the_width_unless_it_is_given(llama):
    for flags, inner in (({"width": 64}, 192), ({"width": 64, "inner": 50}, 50)):
        folder = llama("train", run=str(inner), **flags).ok().folder
        assert tomllib.loads((folder / "config.toml").read_text())["inner"] == inner


@pytest.mark.parametrize("command", ["plan", "compare", "advise"])
def test_the_other_commands_accept_it(llama, command):
    assert llama(command, json=True).ok().document


def test_it_has_a_report(run, llama):
    result = llama("train").ok()
    (result.folder / "report.html").unlink()
    run("report", "run").ok()
    assert "llama-1m" in (result.folder / "report.html").read_text()


def test_a_config_file_names_it(run):
    (run.folder / "job.toml").write_text('model = "llama-1m"\nkv-heads = 1\n')
    assert "2 heads, 1 of keys and values" in run.text("train", config="job.toml").ok().stdout


def test_token_files_set_its_vocabulary(run, data):
    run.job("train", {"data": data.tokens, "batch": 2, "layers": 1, "memory": "200MiB"}, LLAMA).ok()


@pytest.mark.parametrize("micro_batch", [8, 3, 1])
def test_another_split_gives_the_same_updates(llama, micro_batch):
    whole = llama("train", run="whole", micro_batch=8, steps=4).ok()
    split = llama("train", run="split", micro_batch=micro_batch, steps=4).ok()
    for ours, theirs in zip(split.metrics, whole.metrics):
        for name in ("loss", "gradient_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5)  # fp32 sums in another order


def test_recompute_changes_no_bit(llama):
    never, always = (llama("train", layers=2, micro_batch=3, steps=4, recompute=how, run=how).ok()
                     for how in ("never", "always"))
    assert never.column("loss") == always.column("loss") and weights_file(never) == weights_file(always)
    assert max(always.column("peak_bytes")) < max(never.column("peak_bytes"))


def test_a_resumed_run_is_bit_for_bit_the_one_that_was_never_stopped(run, resume):  # noqa: F811
    reference = train(run, "reference", dropout=None, **LLAMA).ok()
    cut(reference.folder, run.folder / "run")
    assert_same(resume().ok(), reference)


@pytest.mark.parametrize("flag, was, now", [("kv-heads", 2, 1), ("inner", 96, 64), ("model", "llama-1m", "gpt-tiny")])
def test_a_resume_with_other_sizes_is_refused(run, resume, flag, was, now):  # noqa: F811
    train(run, "run", dropout=None, steps=4, **LLAMA).ok()
    resume(f"--{flag}", now).refused(2, f"{flag} was {was}, is {now}", "--resume-changed")


@pytest.mark.parametrize("flags, words", [
    ({"heads": 3}, ["width 32", "heads 3"]), ({"kv_heads": 3}, ["heads 2", "kv_heads 3"]),
    ({"heads": 32}, ["a head has 1 numbers", "width 32 / heads 32", "even"]), ({"kv_heads": 0}, ["--kv-heads 0"]),
    ({"inner": "1.5"}, ["--inner", "1.5"]), ({"dropout": 0.1}, ["--dropout", "llama-1m"]),
    ({"norm": "rms"}, ["--norm", "llama-1m"]), ({"model": "llama"}, ["llama-1m", "llama-15m", "llama-110m"]),
    ({"model": "gpt-tiny", "kv_heads": 1}, ["--kv-heads", "gpt-tiny"]),
    ({"model": "gpt-tiny", "inner": 64}, ["--inner", "gpt-tiny"])])
def test_what_is_wrong_with_its_sizes_is_named(llama, flags, words):
    llama("train", **flags).refused(2, *words)


def test_it_does_not_train_on_images(run):
    run.images("train", norm=None, model="llama-1m").refused(2, "--model llama-1m", "images", "resnet or mlp")
