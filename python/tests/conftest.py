"""What the tests of the package share: small models, and the gradient of a batch at once to compare with."""

import gc
import pathlib
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]

torch.optim.SGD(torch.nn.Linear(1, 1).parameters())  # imports torch's compiler, with as many objects as torch has
gc.freeze()  # torch's own objects: looking through them again takes most of the time of a collection
torch.set_num_threads(1)  # the machine is shared, and two threads that wait for each other become many times slower


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_budget_left():
    yield
    memory = sys.modules.get("microbatch.memory")
    if memory is not None and memory.stats().budget_bytes is not None:
        memory.set_budget(None)


def gradients(model):
    return {name: None if one.grad is None else one.grad.clone() for name, one in model.named_parameters()}


def whole_batch_gradients(model, batch, loss):
    """By torch alone: the mean gradient of the batch at once."""
    total, weight = loss(model, batch)
    (total / float(weight)).backward()
    result = gradients(model)
    model.zero_grad()
    return result


def relative_difference(ours, theirs):
    """Over all parameters: |ours - theirs| / |theirs|."""
    assert {name for name, one in ours.items() if one is not None} == {
        name for name, one in theirs.items() if one is not None
    }
    pairs = [(one, theirs[name]) for name, one in ours.items() if one is not None]
    difference = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    size = sum(float(b.double().square().sum()) for _, b in pairs)
    return (difference / size) ** 0.5
