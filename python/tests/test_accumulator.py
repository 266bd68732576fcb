"""What an Accumulator promises beside the gradient: transactions, streaming, state, schedules."""

import copy
import math
import subprocess
import sys
import textwrap

import models
import pytest
import torch
from conftest import gradients, relative_difference, whole_batch_gradients
from torch import nn

import microbatch as mb


def job(make=lambda p: mb.AdamW(p, lr=0.01), **how):
    model, batch, loss = models.mlp()
    return mb.Accumulator(model, make(model.parameters()), loss, **({"micro_batch": 3} | how)), batch


def test_the_report_says_what_became_of_the_batch():
    accumulator, batch = job(clip_norm=0.01)
    report = accumulator.step(batch)
    assert report.applied
    assert report.reason == ""
    assert (report.micro_batches, report.weight, report.learning_rate) == (3, 8.0, 0.01)
    assert report.loss == pytest.approx(math.log(3), abs=0.5)
    assert report.gradient_norm > 0.01
    assert report.peak_bytes > 0
    assert report.plan == mb.Plan(3)


def test_a_loss_that_is_not_finite_is_not_applied():
    accumulator, (x, y) = job()
    before = [one.detach().clone() for one in accumulator.model.parameters()]
    report = accumulator.step((x * math.nan, y))
    assert not report.applied
    assert report.reason == "loss is not finite"
    assert all(torch.equal(a, b) for a, b in zip(before, accumulator.model.parameters(), strict=True))


def test_the_guard_refuses_a_spike_and_its_state_goes_on():
    accumulator, (x, y) = job(lambda p: mb.SGD(p, lr=0.001), guard=mb.SpikeGuard(window=8, least=4))
    for _ in range(8):
        assert accumulator.step((x, y)).applied
    state = accumulator.state_dict()
    report = accumulator.step((1e4 * x, y))
    assert not report.applied
    assert "exceeds" in report.reason
    other, _ = job(lambda p: mb.SGD(p, lr=0.001), guard=mb.SpikeGuard(window=8, least=4))
    other.load_state_dict(state)
    assert not other.step((1e4 * x, y)).applied


def test_gather_without_an_optimizer_leaves_the_mean_gradient():
    model, batch, loss = models.mlp()
    expected = whole_batch_gradients(model, batch, loss)
    accumulator = mb.Accumulator(model, None, loss, micro_batch=3)
    report = accumulator.gather(batch)
    assert report.weight == 8.0
    assert relative_difference(gradients(model), expected) < 1e-6
    norm = math.sqrt(sum(float(one.square().sum()) for one in expected.values()))
    assert report.gradient_norm == pytest.approx(norm, rel=1e-6)
    model.zero_grad()
    accumulator.gather(batch)


def test_a_streamed_batch_is_the_same_step():
    results = []
    for streamed in (False, True):
        torch.manual_seed(2)
        accumulator, batch = job()
        for _ in range(3):
            if streamed:
                accumulator.begin()
                for i in range(0, 8, 3):
                    micro = (batch[0][i : i + 3], batch[1][i : i + 3])
                    accumulator.add(*mb.losses.image_classification(accumulator.model, micro))
                accumulator.finish()
                assert accumulator.apply().applied
            else:
                accumulator.step(batch)
        results.append([one.detach() for one in accumulator.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("make", [lambda p: mb.AdamW(p, lr=0.1), lambda p: mb.SGD(p, lr=0.1, momentum=0.9),
                                  lambda p: torch.optim.AdamW(p, lr=0.1, fused=True)])
@pytest.mark.parametrize("schedule", [
    lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
    lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=4),
    lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.2, total_steps=20),
])
def test_torchs_schedulers_set_the_rate(make, schedule):
    accumulator, batch = job(make)
    scheduler = schedule(accumulator.optimizer)
    for _ in range(6):
        expected = accumulator.optimizer.param_groups[0]["lr"]
        assert accumulator.step(batch).learning_rate == expected
        scheduler.step()


def test_parameter_groups_have_their_own_rate_and_decay():
    updates = []
    for make in (mb.AdamW, torch.optim.AdamW):
        torch.manual_seed(4)
        model, batch, loss = models.mlp()
        groups = [{"params": model[0].parameters(), "lr": 0.1, "weight_decay": 0.5}, {"params": model[2].parameters()}]
        accumulator = mb.Accumulator(model, make(groups, lr=0.01, weight_decay=0.0), loss, micro_batch=3)
        for _ in range(5):
            accumulator.step(batch)
        updates.append({name: one.detach().clone() for name, one in model.named_parameters()})
    assert relative_difference(updates[0], updates[1]) < 1e-5


@pytest.mark.parametrize(("ours", "theirs"), [
    (lambda p: mb.AdamW(p, lr=0.01), lambda p: torch.optim.AdamW(p, lr=0.01)),
    (lambda p: mb.SGD(p, lr=0.01, momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9)),
])
def test_a_state_goes_from_one_optimizer_to_torchs_and_back(ours, theirs):
    accumulator, batch = job(ours)
    for _ in range(3):
        accumulator.step(batch)
    weights = {name: one.clone() for name, one in accumulator.model.state_dict().items()}
    ends = []
    for make in (ours, theirs):
        other, _ = job(make)
        other.model.load_state_dict(weights)
        other.optimizer.load_state_dict(copy.deepcopy(accumulator.optimizer.state_dict()))
        for _ in range(3):
            other.step(batch)
        ends.append({name: one.detach().clone() for name, one in other.model.named_parameters()})
    for _ in range(3):
        accumulator.step(batch)
    ends.append({name: one.detach().clone() for name, one in accumulator.model.named_parameters()})
    assert all(torch.equal(one, ends[2][name]) for name, one in ends[0].items())
    assert relative_difference(ends[1], ends[2]) < 1e-5


def test_our_optimizers_step_in_a_plain_loop():
    model, (x, y), loss = models.mlp()
    optimizer = mb.AdamW(model.parameters(), lr=0.05)
    losses = []
    for _ in range(30):
        total, weight = loss(model, (x, y))
        (total / weight).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total))
    assert losses[-1] < 0.2 * losses[0]


def test_noise_is_measured_every_so_many_steps():
    accumulator, (x, _) = job(lambda p: mb.SGD(p, lr=0.0), noise_every=2, micro_batch=1)
    batch = (x, torch.zeros(8, dtype=torch.long))  # all pull in one direction: the noise does not hide the gradient
    assert [accumulator.step(batch).noise_batch is not None for _ in range(4)] == [True, False, True, False]


def test_auto_plans_once_and_again_for_a_larger_batch():
    accumulator, (x, y) = job(micro_batch="auto")
    assert "not planned yet" in repr(accumulator)
    accumulator.step((x, y))
    first = accumulator.last_plan
    accumulator.step((x, y))
    assert accumulator.last_plan is first
    accumulator.step((torch.cat([x, x]), torch.cat([y, y])))
    assert accumulator.last_plan.batch == 16
    assert "chosen" in str(accumulator.last_plan)


def test_a_plan_leaves_no_trace():
    accumulator, batch = job(micro_batch="auto")
    model = accumulator.model
    before = [one.detach().clone() for one in model.state_dict().values()] + [torch.get_rng_state()]
    mb.plan(accumulator, batch, memory="1GiB")
    after = [*model.state_dict().values(), torch.get_rng_state()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(one.grad is None for one in model.parameters())
    assert not accumulator.optimizer.state_dict()["state"]


@pytest.mark.parametrize("make", [lambda p: mb.AdamW(p), lambda p: torch.optim.AdamW(p, fused=True),
                                  lambda p: torch.optim.SGD(p, momentum=0.9)])
def test_a_plan_of_a_torch_optimizer_leaves_no_state(make):
    accumulator, batch = job(make, micro_batch="auto")
    mb.plan(accumulator, batch)
    assert not accumulator.optimizer.state_dict()["state"]
    accumulator.step(batch)
    state = str(accumulator.optimizer.state_dict())
    mb.plan(accumulator, batch)
    assert str(accumulator.optimizer.state_dict()) == state


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_recompute_makes_the_same_bits_in_less_memory(name):
    model, batch, loss = models.EXACT[name]()
    batch = {key: one.repeat(4, 1) for key, one in batch.items()}
    peaks, ends = [], []
    for recompute in (False, True):
        accumulator = mb.Accumulator(model, None, loss)
        accumulator.plan = mb.Plan(16, recompute)
        torch.manual_seed(1)
        live = mb.memory.stats().live_bytes
        report = accumulator.gather(batch)
        peaks.append(report.peak_bytes - live)
        ends.append(gradients(model))
        model.zero_grad()
    assert all(torch.equal(one, ends[1][key]) for key, one in ends[0].items() if one is not None)
    assert peaks[1] < 0.8 * peaks[0]


def test_recompute_of_named_blocks_is_switched_off_without_a_trace():
    model = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)), nn.Linear(6, 3))
    batch = (torch.randn(8, 6), torch.arange(8) % 3)
    loss = mb.losses.image_classification
    ends = []
    for recompute in (False, True):
        torch.manual_seed(3)
        model[1][1].reset_running_stats()
        accumulator = mb.Accumulator(model, None, loss, recompute=nn.Sequential)
        accumulator.plan = mb.Plan(4, recompute)
        accumulator.gather(batch)
        ends.append(list(gradients(model).values()) + [one.clone() for one in model.buffers()])
        model.zero_grad()
        accumulator.plan = mb.Plan(4)
        assert "forward" not in model[1].__dict__
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_parameters_made_before_the_budget_count():
    code = textwrap.dedent("""
        import torch
        from torch import nn
        model = nn.Linear(1000, 1000)
        import microbatch as mb
        assert mb.memory.stats().live_bytes == 0
        mb.Accumulator(model, mb.SGD(model.parameters()), mb.losses.image_classification, micro_batch=1)
        assert mb.memory.stats().live_bytes == 4 * 1001 * 1000, mb.memory.stats()
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_changes_nothing_in_torch_and_takes_little_time():
    code = textwrap.dedent("""
        import time
        import torch
        before = torch._C._dispatch_dump("aten::mm")
        started = time.process_time()
        import microbatch
        assert time.process_time() - started < 0.3, time.process_time() - started
        assert torch._C._dispatch_dump("aten::mm") == before
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_forked_child_that_drops_an_accumulator_ends():
    code = textwrap.dedent("""
        import os, sys, torch
        from torch import nn
        import microbatch as mb
        torch.set_num_threads(2)
        model = nn.Linear(64, 3)
        accumulator = mb.Accumulator(model, mb.SGD(model.parameters()), mb.losses.image_classification, micro_batch=8)
        batch = (torch.randn(64, 64), torch.arange(64) % 3)
        accumulator.step(batch)
        child = os.fork()
        if child == 0:
            del accumulator
            sys.exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
