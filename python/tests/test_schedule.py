"""Schedules drive any optimizer; the rules for the batch are the library's."""

import math

import pytest
import torch
from torch import nn

import microbatch as mb


def optimizer(*rates):
    return torch.optim.SGD([{"params": [nn.Parameter(torch.ones(1))], "lr": rate} for rate in rates])


def test_warmup_rises_to_the_peak_and_the_cosine_falls_to_the_floor():
    schedule = mb.Schedule("cosine", peak=0.1, floor=0.01, warmup="10 steps", length="110 steps")
    assert schedule.rate(steps=0) == pytest.approx(0.01)  # the first of 10 steps has a tenth of the peak
    assert schedule.rate(steps=9) == pytest.approx(0.1)
    assert schedule.rate(steps=60) == pytest.approx(0.055)  # half way between peak and floor
    assert schedule.rate(steps=110) == pytest.approx(0.01)


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine", "wsd", "polynomial"])
def test_every_shape_stays_between_floor_and_peak(shape):
    schedule = mb.Schedule(shape, peak=1.0, floor=0.0, length=50, decay=10 if shape == "wsd" else None)
    rates = [schedule.rate(steps=i) for i in range(51)]
    assert max(rates) == 1.0
    assert min(rates) >= 0.0
    assert shape == "constant" or rates == sorted(rates, reverse=True)


def test_it_drives_the_groups_of_an_optimizer_in_their_ratio():
    driven = optimizer(0.1, 0.05)
    scheduler = mb.Schedule("linear", peak=1.0, length=4).drive(driven)
    found = [scheduler.get_last_lr()]
    for _ in range(4):
        scheduler.step()
        found.append(scheduler.get_last_lr())
    assert found == [[1.0, 0.5], [0.75, 0.375], [0.5, 0.25], [0.25, 0.125], [0.0, 0.0]]


def test_a_schedule_in_tokens_follows_the_tokens():
    driven = optimizer(1.0)
    scheduler = mb.Schedule("linear", peak=1.0, length="1k tokens").drive(driven)
    scheduler.step(samples=3, tokens=250)
    assert scheduler.get_last_lr() == [0.75]


def test_a_schedule_in_samples_wants_to_be_told_of_them():
    schedule = mb.Schedule("linear", peak=1.0, length="1k samples")
    scheduler = schedule.drive(optimizer(1.0))
    with pytest.raises(mb.UsageError, match=r"counts samples: call step\(samples=...\)"):
        scheduler.step()
    with pytest.raises(mb.UsageError, match="counts samples: give samples="):
        schedule.rate(steps=5)
    assert schedule.rate(samples=500) == 0.5


def test_its_state_goes_on():
    one, other = optimizer(1.0), optimizer(1.0)
    schedule = mb.Schedule("cosine", peak=1.0, length=10)
    scheduler = schedule.drive(one)
    for _ in range(3):
        scheduler.step()
    resumed = schedule.drive(other)
    resumed.load_state_dict(scheduler.state_dict())
    assert resumed.get_last_lr() == scheduler.get_last_lr() != [1.0]
    with pytest.raises(mb.BadData, match="not the state of a schedule"):
        resumed.load_state_dict({"last_epoch": 3})


@pytest.mark.parametrize(("bad", "said"), [
    ({"shape": "square", "length": 3}, "square"),
    ({"shape": "cosine"}, "length"),
    ({"shape": "cosine", "length": "3 laps"}, "laps"),
    ({"shape": "cosine", "length": 10, "warmup": 11}, "warmup"),
    ({"shape": "cosine", "length": True}, "an interval is"),
    ({"shape": "wsd", "length": 10}, "decay"),
    ({"shape": "cosine", "length": 10, "decay": 3}, "decay is for the shape 'wsd'"),
    ({"shape": "cosine", "length": 10, "peak": "1e-3"}, "peak is '1e-3'"),
    ({"shape": "constant", "peak": math.nan}, "peak"),
])
def test_a_schedule_that_makes_no_sense_is_refused(bad, said):
    with pytest.raises(mb.UsageError, match=said):
        mb.Schedule(**({"peak": 1.0} | bad))


def test_the_rules_for_the_batch():
    assert mb.scale_to_batch("linear", lr=0.1, reference_batch=32, batch=128).lr == pytest.approx(0.4)
    assert mb.scale_to_batch("sqrt", lr=0.1, reference_batch=32, batch=128).lr == pytest.approx(0.2)
    sde = mb.scale_to_batch("adam-sde", lr=0.1, reference_batch=32, batch=128, betas=(0.9, 0.99), eps=1e-8)
    assert sde.betas == pytest.approx((0.6, 0.96))  # 1 - 4 (1 - beta)
    assert sde.eps == pytest.approx(0.5e-8)
    half_life = mb.scale_to_batch("beta2-time", lr=0.1, reference_batch=32, batch=64, betas=(0.9, 0.99))
    assert half_life.betas[1] == pytest.approx(0.99**2)
    with pytest.raises(mb.UsageError, match="no beta1 for a batch of 128 times the reference"):
        mb.scale_to_batch("adam-sde", lr=0.1, reference_batch=1, batch=128)
