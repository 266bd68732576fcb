"""The norm of a gpt."""

import math

import pytest

from conftest import weights_file
from resuming import assert_same, checkpoints_of, cut, resume, train  # noqa: F401
from test_resume_damage import crc32c


def test_an_rms_norm_has_no_bias(run):
    weights = run.text("train", norm="rms").ok().weights
    norms = [name for name in weights if "norm" in name]
    assert sorted(norms) == ["blocks.0.attention_norm.weight", "blocks.0.mlp_norm.weight", "norm.weight"]


def test_a_layer_norm_is_the_default(run):
    given, default = run.text("train", norm="layer", run="given").ok(), run.text("train", run="default").ok()
    assert weights_file(given) == weights_file(default)
    assert any(name.endswith("norm.bias") for name in given.weights)


def test_it_trains_with_rms_norms(run):
    result = run.text("train", norm="rms", steps=40, micro_batch=3).ok()
    assert all(map(math.isfinite, result.column("loss")))
    assert result.metrics[-1]["loss"] < result.metrics[0]["loss"] - 0.5


def test_recompute_changes_no_bit_with_rms_norms(run):
    never, always = (run.text("train", norm="rms", dropout=0.1, micro_batch=3, steps=4, recompute=how, run=how).ok()
                     for how in ("never", "always"))
    assert never.column("loss") == always.column("loss") and weights_file(never) == weights_file(always)


def test_a_resumed_run_with_rms_norms_is_bit_for_bit_the_one_that_was_never_stopped(run, resume):  # noqa: F811
    reference = train(run, "reference", norm="rms").ok()
    cut(reference.folder, run.folder / "run")
    assert_same(resume().ok(), reference)


def forget_norm(checkpoint):
    """As a version without the option would have written it."""
    state, manifest = checkpoint / "state.json", checkpoint / "manifest.json"
    before = state.read_bytes()
    after = before.replace(b'norm = \\"layer\\"\\n', b"")
    assert len(after) == len(before) - 18
    state.write_bytes(after)
    content = manifest.read_text().rpartition(",\n")[0]
    for old, new in ((f'"bytes": {len(before)}', f'"bytes": {len(after)}'),
                     (f"{crc32c(before):08x}", f"{crc32c(after):08x}")):
        assert content.count(old) == 1
        content = content.replace(old, new)
    manifest.write_text(f'{content},\n  "crc32c": "{crc32c(content.encode()):08x}"\n}}\n')


@pytest.mark.parametrize("was, now", [("rms", "layer"), ("layer", "rms")])
def test_a_resume_with_another_norm_is_refused(run, resume, was, now):  # noqa: F811
    train(run, "run", norm=was, steps=4).ok()
    resume("--norm", now).refused(2, f"norm was {was}, is {now}", "--resume-changed")


def test_a_run_from_before_the_option_resumes_with_layer_norms(run, resume):  # noqa: F811
    reference = train(run, "reference").ok()
    folder = cut(reference.folder, run.folder / "run")
    forget_norm(checkpoints_of(folder)[-1])
    resume("--norm", "rms").refused(2, "norm was layer, is rms")
    assert_same(resume("--norm", "layer").ok(), reference)


@pytest.mark.parametrize("job, norm, choices", [("text", "batch", "layer or rms"), ("images", "layer", "batch, group or rms")])
def test_a_norm_of_another_model_is_refused(run, job, norm, choices):
    getattr(run, job)("train", norm=norm).refused(2, "--norm: ", f'"{norm}"', choices)
