"""BatchNorm policies: exact is the batch at once, whatever the cut; the others do what they say."""

import copy
import json
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import microbatch as mb


class Block(nn.Module):
    """As in torchvision: in-place ReLU and addition."""

    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.down = None
        if stride != 1 or inputs != outputs:
            self.down = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        identity = x if self.down is None else self.down(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self, drop=0.0, checkpoints=None):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.blocks = nn.ModuleList([Block(4, 4), Block(4, 8, 2)])
        self.drop, self.fc = nn.Dropout(drop), nn.Linear(8, 5)
        self.checkpoints = checkpoints

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x) if self.checkpoints is None else checkpoint(block, x, use_reentrant=self.checkpoints == "reentrant")
        return self.fc(self.drop(x.mean((2, 3))))


def loss(model, micro):
    x, y = micro
    return functional.cross_entropy(model(x), y, reduction="sum"), len(y)


@pytest.fixture
def job():
    torch.manual_seed(5)
    return ResNet().double(), (torch.randn(22, 1, 9, 9, dtype=torch.float64), torch.randint(0, 5, (22,)))


def at_once(model, batch):
    """The gradients and buffers after the batch at once, by plain torch."""
    own = copy.deepcopy(model)
    total, count = loss(own, batch)
    (total / count).backward()
    return [one.grad for one in own.parameters()], list(own.buffers())


def gathered(model, batch, plan, own_loss=loss, **how):
    own = copy.deepcopy(model)
    accumulator = mb.Accumulator(own, None, own_loss, micro_batch=plan.micro_batch, batch_norm=plan.batch_norm, **how)
    accumulator.plan = plan
    accumulator.gather(batch)
    return [one.grad for one in own.parameters()], list(own.buffers())


def assert_close(found, wanted, bar=1e-12):
    # Norm by norm in fp64: rounding of some hundred sums is below 1e-12.
    for one, other in zip(found, wanted, strict=True):
        assert (one.double() - other.double()).norm() <= bar * max(other.double().norm(), 1e-3)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("micro_batch", [3, 8, 21])
def test_exact_is_the_batch_at_once(job, micro_batch, recompute):
    gradients, buffers = gathered(*job, mb.Plan(micro_batch, recompute, "exact"))
    wanted, moved = at_once(*job)
    assert_close(gradients, wanted)
    assert_close(buffers, moved)


def test_exact_with_a_loss_that_brings_its_own_gradient(job):
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2.0 * x

        @staticmethod
        def backward(ctx, gradient):
            return 2.0 * gradient

    def doubled(model, micro):
        x, y = micro
        return functional.cross_entropy(Twice.apply(model(Twice.apply(x))), y, reduction="sum"), len(y)

    model, batch = job
    own = copy.deepcopy(model)
    total, count = doubled(own, batch)
    (total / count).backward()
    gradients, _ = gathered(model, batch, mb.Plan(8, True, "exact"), doubled)
    assert_close(gradients, [one.grad for one in own.parameters()])


def test_exact_beside_activation_checkpoints_of_the_model(job):
    model, batch = job
    model.checkpoints = "not reentrant"
    gradients, _ = gathered(model, batch, mb.Plan(8, False, "exact"))
    assert_close(gradients, at_once(model, batch)[0])


def test_a_batch_norm_in_a_reentrant_checkpoint_is_refused_with_what_to_do(job):
    model, batch = job
    model.checkpoints = "reentrant"
    with pytest.raises(mb.UsageError, match="BatchNorm.*deferred"):
        gathered(model, batch, mb.Plan(8, False, "exact"))


def test_layers_that_depend_on_the_data_are_refused_by_name():
    class Flow(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fc = nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.Linear(4, 5)

        def forward(self, x):
            return self.fc(self.a(x) if x.sum() > 0 else self.b(x))

    batch = torch.cat([torch.ones(2, 4), -torch.ones(2, 4)]), torch.zeros(4, dtype=torch.long)
    with pytest.raises(mb.UsageError, match="micro-batch 0 comes to a, micro-batch 1 to b.*deferred"):
        gathered(Flow(), batch, mb.Plan(2, False, "exact"))


def test_what_the_loss_raises_in_any_micro_batch_passes_and_changes_nothing(job):
    model, batch = job
    for failing in range(3):
        calls = 0

        def fails(model, micro, failing=failing):
            nonlocal calls
            calls += 1
            found = loss(model, micro)
            if len(micro[1]) == (8, 8, 6)[failing] and calls > failing + 1:
                raise ValueError("in the loss")
            return found

        own = copy.deepcopy(model)
        optimizer = mb.SGD(own.parameters(), lr=0.1)
        accumulator = mb.Accumulator(own, optimizer, fails, micro_batch=8, batch_norm="exact")
        with pytest.raises(ValueError, match="in the loss"):
            accumulator.step(batch)
        for one, other in zip(own.state_dict().values(), model.state_dict().values(), strict=True):
            assert torch.equal(one, other)
        assert all(one.grad is None for one in own.parameters())


def test_dropout_has_the_same_masks_forward_and_backward():
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 6), nn.BatchNorm1d(6)).double()
    batch = torch.randn(12, 4, dtype=torch.float64), torch.randn(12, 6, dtype=torch.float64)

    def squares(model, micro):
        return ((model(micro[0]) - micro[1]) ** 2).sum(), len(micro[1])

    def total(step=None, at=0):
        own = copy.deepcopy(model)
        if step is not None:
            with torch.no_grad():
                own[0].weight.view(-1)[at] += step
        torch.manual_seed(7)
        accumulator = mb.Accumulator(own, None, squares, micro_batch=5, batch_norm="exact")
        report = accumulator.gather(batch)
        return report.loss, own[0].weight.grad

    gradient = total()[1].view(-1)
    for at in (0, 7, 23):
        slope = (total(1e-6, at)[0] - total(-1e-6, at)[0]) / 2e-6
        assert slope == pytest.approx(gradient[at].item(), rel=1e-6, abs=1e-8)  # of central differences


def test_deferred_moves_the_statistics_once_by_those_of_the_batch(job):
    model, batch = job
    one = nn.Sequential(model.stem[0], model.stem[1], nn.Flatten(), nn.Linear(4 * 81, 5)).double()
    _, buffers = gathered(one, batch, mb.Plan(5, False, "deferred"))
    assert_close(buffers, at_once(one, batch)[1])
    assert buffers[2].item() == 1


def test_frozen_moves_nothing_and_does_not_depend_on_the_cut(job):
    model, batch = job
    few, buffers = gathered(model, batch, mb.Plan(5, False, "frozen"))
    many, _ = gathered(model, batch, mb.Plan(11, False, "frozen"))
    assert_close(few, many)
    assert all(torch.equal(one, other) for one, other in zip(buffers, model.buffers(), strict=True))


@pytest.mark.parametrize("kind, module", [("group", nn.GroupNorm), ("rms", mb.ChannelRMSNorm)])
def test_layers_are_replaced_on_the_spot_with_their_weights(job, kind, module, tmp_path):
    model, batch = job
    weights = [one for one in model.parameters()]
    replaced = mb.replace_batch_norm(model, kind)
    assert all(one is other for one, other in zip(model.parameters(), weights, strict=True))
    assert len(replaced.layers) == 6 and str(replaced).startswith("6 BatchNorm layers are now ")
    assert sum(isinstance(one, module) for one in model.modules()) == 6
    gradients, _ = gathered(model, batch, mb.Plan(5))
    assert_close(gradients, at_once(model, batch)[0])
    torch.save(model.state_dict(), tmp_path / "model.pt")
    again = ResNet().double()
    mb.replace_batch_norm(again, kind)
    again.load_state_dict(torch.load(tmp_path / "model.pt"))
    assert torch.equal(again(batch[0]), model(batch[0]))


def test_a_replaced_norm_has_the_formula_of_its_paper():
    x = torch.randn(3, 8, 2, 2, dtype=torch.float64)
    y = mb.ChannelRMSNorm(8, eps=0.0).double()(x)
    assert torch.allclose((y**2).mean(1), torch.ones(3, 2, 2, dtype=torch.float64))
    assert torch.allclose(y / y[:, :1], x / x[:, :1])


def test_the_accumulator_replaces_layers_and_says_so(job):
    model, batch = job
    accumulator = mb.Accumulator(model, mb.SGD(model.parameters(), lr=0.1), loss, micro_batch=5, batch_norm="group")
    assert "GroupNorm" in str(accumulator.replaced) and accumulator.step(batch).applied


def test_auto_plans_and_says_what_it_chose(job):
    model, batch = job
    accumulator = mb.Accumulator(model, mb.SGD(model.parameters(), lr=0.1), loss)
    report = mb.plan(accumulator, batch)
    assert report.plan.batch_norm in ("exact", "deferred")
    assert report.batch_norm in str(report) and report.batch_norm.split()[0].strip(":,") in ("exact", "deferred")
    assert accumulator.step(batch).plan == report.plan


def test_streamed_micro_batches_are_deferred_under_auto_and_refused_under_exact(job):
    model, (x, y) = job
    accumulator = mb.Accumulator(model, None, loss)
    accumulator.begin()
    for rows in torch.arange(22).split(8):
        accumulator.add(*loss(model, (x[rows], y[rows])))
    accumulator.finish()
    assert model.stem[1].num_batches_tracked.item() == 1
    for one in model.parameters():
        one.grad = None
    accumulator = mb.Accumulator(model, None, loss, micro_batch=8, batch_norm="exact")
    accumulator.begin()
    accumulator.add(*loss(model, (x[:8], y[:8])))
    with pytest.raises(mb.UsageError, match=r"whole batch to step\(\)"):
        accumulator.add(*loss(model, (x[8:], y[8:])))


@pytest.mark.parametrize(
    "policy, words", [("exat", "'exact', 'deferred'"), (None, "'exact', 'deferred'"), ("deferred", "no BatchNorm layer")]
)
def test_a_policy_that_cannot_be_is_refused_in_one_line(policy, words):
    with pytest.raises(mb.UsageError, match=words):
        mb.Accumulator(nn.Linear(2, 2), None, loss, batch_norm=policy)
    with pytest.raises(mb.UsageError, match="no BatchNorm layer"):
        mb.replace_batch_norm(nn.Linear(2, 2), "group")


def test_verify_names_the_policy_that_fixes_what_it_found(job):
    model, batch = job
    found = mb.verify(model, batch, loss)
    assert "policy exact" in str(found) and found.causes[0].name == "batch_statistics"
    assert mb.verify(model, batch, loss, batch_norm="exact").ok
    assert mb.verify(model, batch, loss, batch_norm="frozen").ok
    assert not mb.verify(model, batch, loss, batch_norm="deferred").ok


def test_a_trained_run_resumes_with_the_same_bits_and_policy(tmp_path):
    torch.manual_seed(3)
    x = torch.randn(40, 1, 6, 6)
    data = list(zip(x, x.mean((1, 2, 3)).gt(0).long(), strict=True))

    def train(folder, steps, resume=False):
        torch.manual_seed(1)
        model = ResNet()
        how = {"batch": 20, "micro_batch": 6, "lr": 0.01, "batch_norm": "exact", "schedule": None, "progress": False}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "resume: length")
            return mb.Trainer(model, data, loss, run=folder, steps=steps, resume=resume, memory="1GiB", **how).train()

    train(tmp_path / "whole", 4)
    train(tmp_path / "cut", 2)
    train(tmp_path / "cut", 4, resume=True)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]
    assert 'batch-norm = "exact"' in (tmp_path / "cut" / "config.toml").read_text()
    lines = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert [one["micro_batches"] for one in lines] == [4] * 4
