"""A run for test_trainer.py, in a process that may be killed: `run_to_kill.py FOLDER STEPS`."""

import random
import sys

import numpy
import torch
from torch import nn

import microbatch as mb


class Samples:
    """Draws from every generator that a data pipeline uses."""

    def __len__(self):
        return 60

    def __getitem__(self, i):
        noise = 0.01 * (random.random() + numpy.random.rand() + torch.rand(1).item())
        return torch.sin(torch.arange(6.0) * (i + 1)) + noise, i % 3


def build():
    torch.manual_seed(7)
    random.seed(7)
    numpy.random.seed(7)
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Dropout(0.2), nn.Linear(12, 3))


def train(folder, steps, **how):
    settings = {"batch": 16, "micro_batch": 5, "lr": 0.01, "steps": steps, "run": folder, "resume": True,
                "checkpoint_every": 3, "progress": False, "verify": False}
    return mb.Trainer(build(), Samples(), mb.losses.image_classification, **(settings | how)).train()


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(sys.argv[1], int(sys.argv[2]))
