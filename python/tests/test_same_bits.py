"""The same GPT trained from Python and by the command: the same bits."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import gpt
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

import microbatch as mb

# Beside the interpreter if the package is installed, else where it was built.
COMMAND = shutil.which("microbatch", path=str(pathlib.Path(sys.executable).parent)) or str(ROOT / "build/release/microbatch")
TEXT = "/usr/share/games/fortunes/fortunes"
STEPS, BATCH, MICRO_BATCH = 12, 20, 6


def train(folder, *flags):
    how = ["--data", TEXT, "--model", "gpt-tiny", "--batch", BATCH, "--micro-batch", MICRO_BATCH, "--recompute", "never",
           "--threads", "1", "--seed", "3", "--noise-every", "0", "--no-verify", "--run", folder, *flags]
    subprocess.run([COMMAND, "train", *map(str, how)], check=True, capture_output=True, env=os.environ | {"TERM": "dumb"})


def steps(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(one["loss"], one["gradient_norm"], one["learning_rate"]) for one in lines]


def test_the_command_reports_on_a_run_from_python_and_does_not_resume_it(tmp_path):
    model = torch.nn.Linear(2, 1)
    mb.Trainer(model, [torch.ones(2)] * 8, lambda model, micro: (model(micro).square().sum(), len(micro)), batch=4,
               run=tmp_path / "run", memory="1GiB", steps=3, progress=False).train()
    (tmp_path / "run" / "report.html").unlink()
    subprocess.run([COMMAND, "report", tmp_path / "run"], check=True, capture_output=True)
    assert "run: Linear" in (tmp_path / "run" / "report.html").read_text()
    resumed = subprocess.run([COMMAND, "train", "--run", tmp_path / "run", "--resume"], capture_output=True, text=True)
    assert resumed.returncode == 5
    assert "mb.Trainer(run=..., resume=True)" in resumed.stderr


@pytest.mark.skipif(not os.path.exists(TEXT), reason="the package fortunes is not installed")
def test_a_run_from_python_has_the_bits_of_the_command(tmp_path):
    train(tmp_path / "start", "--steps", "1", "--lr", "0")  # its weights are those that the command begins with
    train(tmp_path / "command", "--steps", STEPS, "--lr", "0.003", "--warmup", "3 steps")
    model = gpt.Gpt()
    start = load_file(tmp_path / "start" / "model.safetensors")
    assert [name for name, _ in model.named_parameters()] == [name for name in model.state_dict() if name in start]
    model.load_state_dict(start)
    mb.Trainer(model, gpt.Windows(TEXT), gpt.loss, batch=BATCH, micro_batch=MICRO_BATCH, recompute="never", seed=3, lr=0.003,
               warmup=3, steps=STEPS, noise_every=0, run=tmp_path / "python", tokens_per_sample=64, verify=False,
               progress=False).train()
    assert steps(tmp_path / "python") == steps(tmp_path / "command")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("python", "command"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
