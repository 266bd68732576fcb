"""Small runs of mb.Trainer, and what two of them have in common."""

import json

import models
import torch

import microbatch as mb


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def trained(folder):
    """What two runs with the same bits have in common."""
    steps = [(one["step"], one["loss"], one["gradient_norm"], one["learning_rate"]) for one in lines(folder)]
    return steps, (folder / "model.safetensors").read_bytes()


def pairs(samples=64):
    x = torch.randn(samples, 6)
    return list(zip(x, x.argmax(1) % 3, strict=True))


def trainer(folder, **how):
    model, _, loss = models.mlp()
    settings = {"batch": 16, "lr": 0.01, "run": folder, "memory": "1GiB", "progress": False}
    return mb.Trainer(model, how.pop("data", None) or pairs(), how.pop("loss", loss), **(settings | how))
