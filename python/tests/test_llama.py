"""The command's llama is Hugging Face's: the same names, values, gradients and steps."""

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

transformers = pytest.importorskip("transformers")

# Beside the interpreter if the package is installed, else where it was built.
COMMAND = shutil.which("microbatch", path=str(pathlib.Path(sys.executable).parent)) or str(ROOT / "build/release/microbatch")
LENGTH, RATE, STEPS = 24, 0.5, 4
SIZES = {"layers": 2, "heads": 4, "kv-heads": 2, "width": 48, "inner": 80, "length": LENGTH}


@pytest.fixture
def text(tmp_path):
    """Forty windows to train on."""
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(ord("a") + (7 * i * i + i // 3) % 26 for i in range(40 * LENGTH * 10 // 9 + 20)))
    return path


def train(data, folder, **flags):
    """Plain descent along the gradient of the whole data."""
    flags = SIZES | {"model": "llama-1m", "data": data, "batch": len(gpt.Windows(data, LENGTH)), "micro-batch": 7,
                     "optimizer": "sgd", "momentum": 0, "weight-decay": 0, "clip": "inf", "schedule": "constant",
                     "memory": "200MiB", "threads": 1, "run": folder} | flags
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    subprocess.run([COMMAND, "train", *words], check=True, capture_output=True, env=os.environ | {"TERM": "dumb"})
    return load_file(folder / "model.safetensors")


def twin(weights):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=48,
        intermediate_size=80, max_position_embeddings=LENGTH, rms_norm_eps=1e-6, rope_theta=10000.0,
        tie_word_embeddings=True))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert missing in ([], ["lm_head.weight"]) and unexpected == []  # which is the embedding
    return model


def loss_of(model, data):
    windows = gpt.Windows(data, LENGTH)
    tokens, targets = (torch.stack(each) for each in zip(*(windows[i] for i in range(len(windows)))))
    return torch.nn.functional.cross_entropy(model(tokens).logits.flatten(0, 1), targets.flatten())


def test_it_trains_like_hugging_faces_model(tmp_path, text):
    start = train(text, tmp_path / "start", steps=1, lr=0)  # its weights are those that the command begins with
    trained = train(text, tmp_path / "trained", steps=STEPS, lr=RATE)
    model = twin(start)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, text)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    metrics = map(json.loads, (tmp_path / "trained" / "metrics.jsonl").read_text().splitlines())
    # fp32: the rounding of sums in another order.
    assert [one["loss"] for one in metrics] == pytest.approx(losses, rel=1e-6)
    for name, expected in model.named_parameters():
        moved, expected = trained[name] - start[name], expected.detach() - start[name]
        assert float((moved - expected).norm() / expected.norm()) < 1e-4, name


def test_its_gradient_is_that_of_hugging_faces_model(tmp_path, text):
    start = train(text, tmp_path / "start", steps=1, lr=0)
    step = train(text, tmp_path / "step", steps=1, lr=RATE)
    model = twin(start)
    loss_of(model, text).backward()
    for name, parameter in model.named_parameters():
        gradient = (start[name].double() - step[name].double()) / RATE
        # The weights are known to 6e-8 of themselves, the gradient to about as many digits.
        noise = 6e-8 * float(start[name].norm()) / RATE
        difference = float((gradient - parameter.grad).norm())
        assert difference <= 2e-5 * float(parameter.grad.norm()) + noise, name


def test_the_file_that_it_writes_loads_as_a_pretrained_model(tmp_path, text):
    weights = train(text, tmp_path / "run", steps=1, lr=RATE)
    model = twin(weights)
    folder = tmp_path / "pretrained"
    folder.mkdir()
    shutil.copy(tmp_path / "run" / "model.safetensors", folder)
    model.config.save_pretrained(folder)
    loaded = transformers.LlamaForCausalLM.from_pretrained(folder)
    assert torch.equal(loaded.lm_head.weight, weights["model.embed_tokens.weight"])
    assert torch.equal(loss_of(loaded, text), loss_of(model, text))
