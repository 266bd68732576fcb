"""Advice on the batch size and the curvature, on models whose values are known."""

import pytest
import torch
from torch import nn

import microbatch as mb


def squares(model, micro):
    x, y = micro
    return (model(x).squeeze(-1) - y).square().sum() / 2, len(y)


def noisy(batches, size, generator):
    for _ in range(batches):
        x = torch.randn(size, 4, generator=generator)
        yield x, x @ torch.tensor([1.0, -2.0, 3.0, 0.5]) + torch.randn(size, generator=generator)


def test_the_noise_batch_is_that_of_the_linear_model():
    # At w = 0: the gradient of a sample is -y x. G = -w*, |G|^2 = 14.25. Per sample, E |g|^2 = E y^2 |x|^2 =
    # (|w*|^2 (d + 2) + d) = 14.25 * 6 + 4, and tr(Sigma) is that less |G|^2: 75.25. B_noise = 75.25 / 14.25 = 5.28.
    model = nn.Linear(4, 1, bias=False)
    nn.init.zeros_(model.weight)
    accumulator = mb.Accumulator(model, mb.SGD(model.parameters()), squares, memory="1GiB")
    batches = noisy(60, 64, torch.Generator().manual_seed(3))
    advice = mb.advise(accumulator, batches, samples=100_000)
    # A batch of 64 has an error of some sqrt(2 / 64) in each; 60 of them, of which about 40 count.
    assert advice.noise_batch == pytest.approx(5.28, rel=0.2)
    assert advice.measures == 60
    assert model.weight.abs().sum() == 0.0
    assert all(one.grad is None for one in model.parameters())
    assert advice.few_samples < advice.noise_batch < advice.few_steps
    assert [one.batch for one in advice.table] == sorted(one.batch for one in advice.table)
    assert "as large as the gradient at a batch of 5" in str(advice)


def test_the_plan_stays_as_it_is():
    model = nn.Linear(4, 1, bias=False)
    accumulator = mb.Accumulator(model, mb.SGD(model.parameters()), squares, memory="1GiB", micro_batch=16)
    mb.advise(accumulator, noisy(3, 64, torch.Generator().manual_seed(3)), samples=1000)
    assert accumulator.plan == mb.Plan(16)


def test_without_a_batch_there_is_no_advice():
    model = nn.Linear(4, 1)
    accumulator = mb.Accumulator(model, mb.SGD(model.parameters()), squares, memory="1GiB")
    with pytest.raises(mb.UsageError, match="no batch was split"):
        mb.advise(accumulator, [], samples=1000)


@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_the_largest_eigenvalue_is_that_of_the_hessian(micro_batch):
    x = torch.randn(8, 4, dtype=torch.float64)
    model = nn.Linear(4, 1, bias=False).double()
    expected = torch.linalg.eigvalsh(x.T @ x / 8)[-1]
    found = mb.curvature(model, (x, torch.zeros(8).double()), squares, micro_batch=micro_batch)
    assert found.converged
    assert found.largest_eigenvalue == pytest.approx(float(expected), rel=1e-5)
    assert model.weight.grad is None


def test_an_exception_in_the_second_backward_passes_as_it_is():
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise LookupError("mine")

    class Copy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return Broken.apply(gradient)

    model = nn.Linear(2, 1)
    with pytest.raises(LookupError, match="mine"):
        mb.curvature(model, torch.ones(3, 2), lambda model, micro: (Copy.apply(model(micro)).square().sum(), 3))
