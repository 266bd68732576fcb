"""The pairs of scripts in examples/python: three lines apart, and only one makes the update of the whole batch."""

import difflib
import logging
import re
import runpy
import sys
import warnings

import pytest
import torch
from conftest import ROOT, relative_difference
from safetensors.torch import load_file

EXAMPLES = ROOT / "examples" / "python"
NAMES = ["plain", "transformers", "lightning"]
BATCH, STEPS = 16, 3

warnings.filterwarnings("ignore", module="lightning.*")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def lines(name, which):
    return (EXAMPLES / f"{name}_{which}.py").read_text(encoding="utf-8").splitlines()


def changes(name):
    """The changed lines with a sign before them, as in a diff."""
    found = difflib.ndiff(lines(name, "before"), lines(name, "after"))
    return [line for line in found if line[0] in "+-"]


def weights(name, which, folder, monkeypatch, micro_batch):
    """The weights that a script saves after a few steps."""
    out = folder / f"{which}-{micro_batch}"
    script = EXAMPLES / f"{name}_{which}.py"
    options = {"batch": BATCH, "micro-batch": micro_batch, "steps": STEPS, "out": out}
    monkeypatch.setattr(sys, "argv", [str(script), *[f"--{key}={value}" for key, value in options.items()]])
    monkeypatch.chdir(folder)
    runpy.run_path(str(script), run_name="__main__")
    return load_file(out / "model.safetensors") if out.is_dir() else torch.load(out)


@pytest.mark.parametrize("name", NAMES)
def test_three_lines_change_at_most(name):
    added = [line for line in changes(name) if line[0] == "+"]
    assert 1 <= len(added) <= 3
    assert all(len(line) <= 122 for line in added)  # no two lines in one


@pytest.mark.parametrize("name", NAMES)
def test_only_the_script_after_ends_where_the_whole_batch_at_once_ends(name, tmp_path, monkeypatch, capsys):
    expected = weights(name, "before", tmp_path, monkeypatch, micro_batch=BATCH)
    before = weights(name, "before", tmp_path, monkeypatch, micro_batch=2)
    after = weights(name, "after", tmp_path, monkeypatch, micro_batch=2)
    ours, theirs = relative_difference(after, expected), relative_difference(before, expected)
    print(f"{name}: {theirs:.1e} before, {ours:.1e} after")  # pytest -rP shows it; docs/python.md has it
    assert ours < 1e-6
    # Adam moves every weight by about the rate, so weights differ by less than gradients do.
    assert theirs > max(1e-4, 1000 * ours)


@pytest.mark.parametrize("name", NAMES)
def test_the_documentation_shows_the_lines_that_change(name):
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    blocks = [block.strip("\n").splitlines() for block in re.findall(r"```diff\n(.*?)```", text, re.DOTALL)]
    assert changes(name) in blocks


def test_a_run_is_kept_in_its_folder_and_resumed(tmp_path, monkeypatch, capsys):
    def run():
        script = EXAMPLES / "run.py"
        monkeypatch.setattr(sys, "argv", [str(script), "--steps=3", "--batch=16", f"--run={tmp_path / 'run'}"])
        runpy.run_path(str(script), run_name="__main__")
        return capsys.readouterr(), (tmp_path / "run" / "model.safetensors").read_bytes()

    first, weights = run()
    assert "held out" in first.out
    assert (tmp_path / "run" / "report.html").exists()
    again, same = run()
    assert "resumes at step 3" in again.err
    assert same == weights
