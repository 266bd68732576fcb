"""A finished run that is resumed at a rate at which it diverges, and how it recovers."""

import json
import re
import shutil

import pytest

from conftest import weights_file
from resuming import checkpoints_of, told_of

SPOIL = ["--lr", "30", "--schedule", "constant", "--clip", "inf", "--steps", "260", "--checkpoint-every", "5 steps"]


def healthy_of(folder):
    """{steps: healthy} of its checkpoints."""
    return {int(checkpoint.name.split("-")[1]): json.loads((checkpoint / "manifest.json").read_text())["healthy"]
            for checkpoint in checkpoints_of(folder)}


@pytest.fixture(scope="module", params=["3", "1"], ids=["keep 3", "keep 1"])
def spoiled(shared_run, request):
    """The finished run, the result of resuming it, and the previous weights."""
    name = f"run{request.param}"
    good = shared_run.text("train", run=name, steps=150, micro_batch=8).ok()
    weights = weights_file(good)
    words = ["train", "--run", name, "--resume", "--keep", request.param, *SPOIL]
    return good, shared_run.in_folder(name, words), weights


def test_the_last_healthy_checkpoint_is_kept_and_named(spoiled):
    _, bad, _ = spoiled
    assert bad.returncode == 4, bad.stderr
    found = healthy_of(bad.folder)
    assert found[150] and sum(found.values()) == 1 and max(found) > 150, found
    assert re.search(r"resume from the healthy checkpoint of step 150 \(--resume\) with a lower --lr than 30",
                     bad.stderr), bad.stderr
    assert "healthy checkpoint of step 150" in (bad.folder / "report.html").read_text()


def test_weights_of_the_finished_run_are_not_overwritten(spoiled):
    _, bad, weights = spoiled
    assert weights_file(bad) == weights
    assert "model.safetensors still holds the weights of the previous run" in bad.stderr
    written = re.search(r"^written   .*$", bad.stdout, re.MULTILINE)[0]
    assert "metrics.jsonl" in written and "model.safetensors" not in written


def test_the_recommended_recovery_works_and_says_from_where(spoiled, run):
    good, bad, weights = spoiled
    shutil.copytree(bad.folder, run.folder / "run")
    spoilt = max(healthy_of(bad.folder))
    result = run("train", "--run", "run", "--resume", "--lr", "0.001").ok()
    first, notes = told_of(result)
    assert first == f"from step 150, the newest healthy checkpoint: at that of step {spoilt}, the run was diverging"
    assert "steps was 150, is 260" in notes
    assert result.column("step") == list(range(1, 261)) and all(result.column("applied"))
    assert result.column("loss")[:150] == good.column("loss")[:150]
    assert result.metrics[-1]["loss"] < result.metrics[0]["loss"] and weights_file(result) != weights


def test_an_interrupted_recovery_resumes_from_its_own_checkpoint(spoiled, run):
    _, bad, _ = spoiled
    folder = shutil.copytree(bad.folder, run.folder / "run")
    run("train", "--run", "run", "--resume", "--lr", "0.001", "--steps", "152").ok()
    assert max(healthy_of(folder)) == 152 and all(healthy_of(folder).values())
    result = run("train", "--run", "run", "--resume", "--steps", "160", "--json").ok()
    assert result.document["resumed_from"] == 152 and result.column("step") == list(range(1, 161))


def test_a_run_that_diverges_without_previous_weights_says_which_it_has_written(run):
    result = run.text("train", micro_batch=8, **dict(steps=260, lr=30, schedule="constant", clip="inf", restores=0))
    assert result.returncode == 4 and "model.safetensors holds the weights of " in result.stderr
    assert (result.folder / "model.safetensors").exists()
