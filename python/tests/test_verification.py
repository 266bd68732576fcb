"""verify() finds what makes a gradient depend on the split, and says what to do."""

import random

import models
import pytest
import torch
from torch import nn

import microbatch as mb


def names(found):
    return [cause.name for cause in found.causes]


@pytest.mark.parametrize("name", sorted(set(models.EXACT) - {"compiled"}))
def test_a_model_without_mistakes_passes(name):
    model, batch, loss = models.EXACT[name]()
    found = mb.verify(model, batch, loss, micro_batch=3)
    assert found.ok, str(found)
    assert str(found) == "8 samples as a whole and in micro-batches of 3: same gradients"


@pytest.mark.parametrize("name", models.OF_THE_BATCH)
def test_a_loss_that_is_of_the_batch_is_named(name):
    make, cause = models.OF_THE_BATCH[name]
    found = mb.verify(*make())
    assert cause in names(found), str(found)
    assert found.differences[0].relative > found.tolerance
    assert found.causes[0].text in str(found)


def mean(model, micro):
    x, y = micro
    return nn.functional.cross_entropy(model(x), y), len(y)


@pytest.mark.parametrize("micro_batch", [1, 3, 4])
def test_a_mean_that_is_passed_as_a_sum_is_found(micro_batch):
    model, batch, _ = models.mlp()
    assert names(mb.verify(model, batch, mean, micro_batch=micro_batch)) == ["averaged_loss"]


def test_a_mean_over_samples_that_are_collated_is_found():
    model, (x, y), _ = models.mlp()
    found = mb.verify(model, list(zip(x, y, strict=True)), mean, collate=torch.utils.data.default_collate)
    assert names(found) == ["averaged_loss"]


def test_dropout_is_random_and_not_a_mistake():
    model, batch, loss = models.mlp()
    # Two of them draw in turn: the order of their draws depends on the split.
    model = nn.Sequential(nn.Dropout(0.2), model[:2], nn.Dropout(0.5), model[2])
    assert names(mb.verify(model, batch, loss)) == ["randomness"]


def test_it_leaves_no_trace():
    model, batch, loss = models.convnet()
    model[2] = nn.Dropout(0.1)
    model[0].eval()
    buffers = [one.clone() for one in model.buffers()]
    states = torch.get_rng_state(), random.getstate()
    mb.verify(model, batch, loss)
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    assert all(one.grad is None for one in model.parameters())
    assert [one.training for one in model] == [False, True, True, True, True]
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()


def test_the_accumulator_refuses_an_averaged_loss_at_its_first_step():
    model, batch, _ = models.mlp()
    accumulator = mb.Accumulator(model, mb.SGD(model.parameters()), mean, micro_batch=3, verify=True)
    with pytest.raises(mb.UsageError, match="the loss is already averaged: return the sum"):
        accumulator.step(batch)


def test_the_accumulator_warns_of_batch_norm_once():
    model, batch, loss = models.convnet()
    accumulator = mb.Accumulator(
        model, mb.SGD(model.parameters()), loss, micro_batch=4, verify=True, batch_norm="naive")
    with pytest.warns(UserWarning, match="normalises over the micro-batch"):
        assert accumulator.step(batch).applied
    assert accumulator.step(batch).applied  # a warning would be an error


def test_the_accumulator_says_nothing_of_exact_batch_norm(recwarn):
    model, batch, loss = models.convnet()
    accumulator = mb.Accumulator(model, mb.SGD(model.parameters()), loss, micro_batch=4, verify=True)
    assert accumulator.step(batch).applied and accumulator.plan.batch_norm == "exact"
    assert not recwarn


def test_the_accumulator_says_nothing_of_a_right_loss(recwarn):
    model, batch, loss = models.mlp()
    accumulator = mb.Accumulator(model, mb.SGD(model.parameters()), loss, micro_batch=3, verify=True)
    assert accumulator.step(batch).applied
    assert not recwarn


def test_where_eight_samples_do_not_fit_fewer_are_checked():
    model = nn.Linear(1, 1)
    seen = []

    def loss(model, micro):
        seen.append(len(micro))
        if len(micro) > 4:
            raise torch.OutOfMemoryError("out of memory")
        return model(micro).mean(), len(micro)

    accumulator = mb.Accumulator(model, mb.SGD(model.parameters()), loss, micro_batch=2, verify=True)
    # Four do not, either: every sample twice is eight.
    with pytest.raises(mb.UsageError, match="2 samples as a whole"):
        accumulator.step(torch.randn(8, 1))
    assert max(seen) == 8


@pytest.mark.parametrize("bad", [0, 8, 9])
def test_a_micro_batch_that_does_not_split_is_refused(bad):
    model, batch, loss = models.mlp()
    with pytest.raises(mb.UsageError, match="micro-batch of at least 1 and below the batch of 8"):
        mb.verify(model, batch, loss, micro_batch=bad)


def test_something_else_than_a_model_is_refused():
    with pytest.raises(mb.UsageError, match="the model is a int"):
        mb.verify(3, torch.ones(2), mean)
