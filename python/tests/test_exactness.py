"""The gradient of a batch is that of the batch at once, whatever the model and however it is cut."""

import models
import pytest
import torch
from conftest import gradients, relative_difference, whole_batch_gradients

import microbatch as mb

CUTS = [1, 3, 7, 8]


@pytest.mark.parametrize("name", models.EXACT)
def test_the_gradient_is_that_of_the_batch_at_once(name):
    model, batch, loss = models.EXACT[name]()
    expected = whole_batch_gradients(model, batch, loss)
    for cut in CUTS:
        mb.Accumulator(model, None, loss, micro_batch=cut).gather(batch)
        # Sums in another order: some 1e-7 for each of a few hundred terms, that do not add up in one direction.
        assert relative_difference(gradients(model), expected) < 1e-6, cut
        model.zero_grad()


# A loss in float64 from end to end; others compute a norm or the loss in float32 whatever the dtype.
DOUBLE = {"bert_classifier", "vit", "mlp", "lstm", "gru", "vae", "custom_function", "gan", "bert", "gpt2", "whisper"}


@pytest.mark.parametrize("name", sorted(DOUBLE))
def test_in_float64_it_is_that_to_1e_12(name):
    model, batch, loss = models.EXACT[name]()
    model.double()
    batch = torch.utils._pytree.tree_map(lambda one: one.double() if one.is_floating_point() else one, batch)
    if name == "gan":
        loss = _double_gan(model)
    expected = whole_batch_gradients(model, batch, loss)
    for cut in CUTS:
        mb.Accumulator(model, None, loss, micro_batch=cut).gather(batch)
        assert relative_difference(gradients(model), expected) < 1e-12, cut
        model.zero_grad()


def _double_gan(generator):
    discriminator = torch.nn.Linear(6, 1).double().requires_grad_(False)

    def loss(model, micro):
        return torch.nn.functional.softplus(-discriminator(model(micro["noise"]))).sum(), len(micro["noise"])

    return loss


@pytest.mark.parametrize("make", [lambda p: mb.AdamW(p, lr=0.01), lambda p: mb.SGD(p, lr=0.1, momentum=0.9),
                                  lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
                                  lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
                                  lambda p: torch.optim.Adagrad(p, lr=0.01, initial_accumulator_value=0.1)])
def test_twenty_steps_end_where_the_plain_loop_ends(make):
    results = []
    for cut in (None, 3):
        torch.manual_seed(5)
        model, _, loss = models.gpt2()
        optimizer = make(model.parameters())
        accumulator = mb.Accumulator(model, optimizer, loss, micro_batch=cut or 8, clip_norm=0.5)
        for seed in range(20):
            batch = models.ragged(seed)
            if cut is None:
                total, weight = loss(model, batch)
                (total / weight).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
            else:
                assert accumulator.step(batch).applied
        results.append({name: one.detach().clone() for name, one in model.named_parameters()})
    # Adam divides by the root of small second moments, which magnifies rounding where a gradient is nearly zero.
    assert relative_difference(results[1], results[0]) < 2e-5
