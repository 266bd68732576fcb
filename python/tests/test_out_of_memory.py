"""A batch that runs out of memory, wherever that is, is undone and run again in smaller micro-batches."""

import copy
import gc
import random
import weakref

import pytest
import torch
from conftest import gradients
from torch import nn
from torch.utils.checkpoint import checkpoint

import microbatch as mb
from microbatch import _core


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(8, 16), nn.Linear(16, 8), nn.BatchNorm1d(8)

    def forward(self, x):
        return x + self.norm(self.second(functional_dropout(self.first(x).relu())))


def functional_dropout(x):
    return nn.functional.dropout(x, 0.2)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1  # a buffer that is assigned anew
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Checkpointed(Net):
    reentrant = False

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


class Reentrant(Checkpointed):
    reentrant = True

    def forward(self, x):
        return super().forward(x.requires_grad_() if not x.requires_grad else x)


def loss(model, micro):
    x, y = micro
    x = x + 0.01 * random.random()  # Python's generator belongs to the state, too
    return nn.functional.cross_entropy(model(x), y, reduction="sum"), len(y)


def job(kind=Net, make_optimizer=lambda p: mb.AdamW(p, lr=0.01), **how):
    torch.manual_seed(3)
    random.seed(3)
    model = kind()
    batch = (torch.randn(8, 8), torch.arange(8) % 3)
    return mb.Accumulator(model, make_optimizer(model.parameters()), loss, **({"micro_batch": 8, "batch_norm": "deferred"} | how)), batch


def state(accumulator):
    model = accumulator.model
    return [one.detach().clone() for one in model.state_dict().values()] + [torch.get_rng_state(), random.getstate()]


def moments(optimizer):
    return [one for state in optimizer.state.values() for one in state.values() if isinstance(one, torch.Tensor)]


def assert_same_bits(one, other):
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("kind", [Net, Checkpointed, Reentrant])
def test_a_failure_at_any_allocation_of_a_step_ends_in_the_bits_of_the_smaller_plan(kind):
    accumulator, batch = job(kind)
    accumulator.step(batch)  # the state of the optimizer is there
    before = _core.allocation_count()
    accumulator.step(batch)
    allocations = _core.allocation_count() - before
    assert allocations > 50

    wanted = {}
    for cut in (8, 4):
        accumulator, batch = job(kind)
        accumulator.step(batch)
        accumulator.plan = mb.Plan(cut)
        accumulator.step(batch)
        wanted[cut] = state(accumulator)

    failed = 0
    for at in range(1, allocations + 1):
        accumulator, batch = job(kind)
        accumulator.step(batch)
        gc.collect()
        live = mb.memory.stats().live_bytes
        _core.fail_allocation(at)
        report = accumulator.step(batch)
        _core.fail_allocation(0)
        assert report.applied
        assert report.out_of_memory in (0, 1)
        # Where the optimizer's step ran out, the same plan is tried once more.
        assert_same_bits(state(accumulator), wanted[report.plan.micro_batch])
        failed += report.out_of_memory
        gc.collect()
        assert mb.memory.stats().live_bytes == live, at
    assert failed > 0.9 * allocations


def test_the_tensors_of_the_failed_attempt_are_gone_before_the_next_one():
    class Holder:
        pass

    alive = []

    def failing(model, micro):
        holder = Holder()
        holder.activations = model(micro[0])
        alive.append(weakref.ref(holder))
        if len(micro[0]) == 8:
            try:
                raise torch.OutOfMemoryError("drill")
            except torch.OutOfMemoryError as error:
                kept = error  # noqa: F841: a cycle of frame and exception
                raise
        assert alive[0]() is None
        return loss(model, micro)

    accumulator, batch = job()
    report = accumulator.step(batch, failing)
    assert report.applied
    assert report.plan.micro_batch == 4
    assert report.out_of_memory == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, LookupError])
def test_an_exception_after_a_retry_passes_as_it_is(error):
    def failing(model, micro):
        if len(micro[0]) == 8:
            raise torch.OutOfMemoryError("drill")
        raise error("from the loss")

    accumulator, batch = job()
    before = state(accumulator)
    with pytest.raises(error, match="from the loss") as raised:
        accumulator.step(batch, failing)
    assert any(frame.name == "failing" for frame in raised.traceback)
    assert_same_bits(state(accumulator), before)
    assert all(one is None for one in gradients(accumulator.model).values())
    assert accumulator.step(batch).applied


def test_where_nothing_fits_it_says_so_and_leaves_all_as_it_was():
    def never(model, micro):
        raise torch.OutOfMemoryError("drill")

    accumulator, batch = job()
    before = state(accumulator)
    with pytest.raises(mb.DoesNotFit, match="micro-batch of 1 sample"):
        accumulator.step(batch, never)
    assert_same_bits(state(accumulator), before)
    with pytest.raises(torch.OutOfMemoryError):  # as code that expects torch's has it
        accumulator.step(batch, never)


class Failing(torch.autograd.Function):
    error = torch.OutOfMemoryError

    @staticmethod
    def forward(ctx, x):
        ctx.samples = len(x)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        if ctx.samples == 8:
            raise Failing.error("from backward")
        return gradient


def test_running_out_inside_backward_is_noticed():
    accumulator, batch = job()
    report = accumulator.step(batch, lambda model, micro: loss(lambda x: Failing.apply(model(x)), micro))
    assert report.applied
    assert report.plan.micro_batch == 4


def test_an_exception_inside_backward_keeps_its_type(monkeypatch):
    monkeypatch.setattr(Failing, "error", ZeroDivisionError)
    accumulator, batch = job()
    with pytest.raises(ZeroDivisionError, match="from backward"):
        accumulator.step(batch, lambda model, micro: loss(lambda x: Failing.apply(model(x)), micro))
    assert accumulator.step(batch).applied


@pytest.mark.parametrize("make", [lambda p: torch.optim.AdamW(p, fused=True), lambda p: torch.optim.SGD(p, fused=True, momentum=0.9)])
@pytest.mark.parametrize("first", [True, False])
def test_a_step_of_a_fused_torch_optimizer_is_whole_or_not_at_all(make, first):
    def prepared():
        accumulator, batch = job(make_optimizer=make)
        if not first:
            accumulator.step(batch)
        return accumulator, batch

    accumulator, batch = prepared()
    accumulator.gather(batch)
    before = _core.allocation_count()
    accumulator.apply()
    allocations = _core.allocation_count() - before
    assert allocations > 0
    for at in range(1, allocations + 1):
        accumulator, batch = prepared()
        accumulator.gather(batch)
        before = copy.deepcopy([*accumulator.model.parameters(), *moments(accumulator.optimizer)])
        _core.fail_allocation(at)
        with pytest.raises(torch.OutOfMemoryError):
            accumulator.apply()
        _core.fail_allocation(0)
        assert_same_bits([*accumulator.model.parameters(), *moments(accumulator.optimizer)], before)


def test_another_torch_optimizer_says_that_its_step_cannot_be_undone():
    accumulator, batch = job(make_optimizer=lambda p: torch.optim.AdamW(p, foreach=False))
    accumulator.gather(batch)
    _core.fail_allocation(12)
    with pytest.raises(mb.DoesNotFit, match="AdamW ran out of memory between its updates"):
        accumulator.apply()
    _core.fail_allocation(0)


def test_a_budget_that_holds_half_a_batch_is_kept():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 3))
    accumulator = mb.Accumulator(model, mb.SGD(model.parameters()), mb.losses.image_classification, micro_batch=1024)
    batch = (torch.randn(1024, 256), torch.arange(1024) % 3)
    accumulator.step(batch)
    whole = accumulator.step(batch).peak_bytes
    budget = whole - 1_500_000
    with mb.memory.budget(budget):
        report = accumulator.step(batch)
    assert report.applied
    assert report.plan.micro_batch < 1024
    assert report.peak_bytes <= budget


def test_the_error_of_an_update_that_cannot_be_undone_is_one_line():
    accumulator, batch = job(make_optimizer=lambda p: torch.optim.AdamW(p, foreach=False))
    accumulator.gather(batch)
    _core.fail_allocation(12)
    with pytest.raises(mb.DoesNotFit) as raised:
        accumulator.apply()
    _core.fail_allocation(0)
    assert "\n" not in str(raised.value)
