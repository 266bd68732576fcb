"""Several processes of torch.distributed: one update, that of the whole batch."""

import os
import sys
import traceback

import pytest
import torch
import torch.multiprocessing
from torch import nn
from torch.nn import functional

import microbatch as mb
import models

STEPS, BATCH = 4, 7


def loss(model, micro):
    x, y, weight = micro
    squares = (model(x) - y).square().sum(1)
    return (squares * weight).sum(), weight.sum()


def batches(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    made = []
    for i in range(STEPS):
        x, y = (torch.randn(BATCH + i, width, generator=generator, dtype=dtype) for width in (5, 3))
        weight = torch.rand(BATCH + i, generator=generator, dtype=dtype)
        weight[: 4 if i == 2 else 0] = 0  # all of a rank's
        made.append((x, y, weight))
    return made


def net(seed=0, norm=False):
    torch.manual_seed(seed)
    layers = [nn.Linear(5, 8), nn.BatchNorm1d(8)] if norm else [nn.Linear(5, 8)]
    return nn.Sequential(*layers, nn.Tanh(), nn.Linear(8, 3)).double()


def state_of(model):
    return {name: one.clone() for name, one in model.state_dict().items()}


def part(batch, rank, size):
    """As uneven as can be: the first rank has what the others have not."""
    rest = [1] * (size - 1)
    if size == 3:
        rest[0] = 0  # a rank without samples
    begins = [0, *torch.tensor([len(batch[0]) - sum(rest), *rest]).cumsum(0).tolist()]
    return tuple(one[begins[rank] : begins[rank + 1]] for one in batch)


def train(case, rank=0, size=1):
    """What a rank does; alone, what one process does."""
    group = None if size == 1 else torch.distributed.group.WORLD
    if case == "causal_lm":
        torch.manual_seed(rank)
        model, whole, function = models.llama()
        all_batches = [whole] * STEPS
    else:
        model, function = net(seed=rank, norm="norm" in case), loss
        all_batches = batches()[: 1 if "once" in case else STEPS]
    optimizer = mb.SGD(model.parameters(), lr=0.1, momentum=0.9) if "torch" not in case else torch.optim.AdamW(
        model.parameters(), lr=0.01)
    shared = "own" not in case
    accumulator = mb.Accumulator(model, optimizer, function, process_group=group, shared_batch=shared,
                                 shard_optimizer="sharded" in case,
                                 micro_batch=8 if "norm" in case else 2,
                                 clip_norm=1.0, batch_norm="deferred" if "norm" in case else "auto")
    reports = []
    for i, batch in enumerate(all_batches):
        if not shared and size > 1:
            batch = part(batch, rank, size)
        if case == "nan" and i == 1 and rank == size - 1:
            batch = (batch[0] * float("nan"), *batch[1:])
        if case == "fails" and i == 1 and rank == 1:
            accumulator.loss = None
            function = None
            try:
                accumulator.step(batch, lambda model, micro: 1 / 0)
            except ZeroDivisionError:
                return state_of(model), ["division by zero"]
        try:
            report = accumulator.step(batch)
        except mb.LostRank as error:
            return state_of(model), [str(error)]
        reports.append((report.loss, report.weight, report.gradient_norm, report.applied, report.reason))
    return state_of(model), reports


def part_of_state(optimizer):
    return sum(one.numel() for state in optimizer.state_dict()["state"].values() for one in state.values())


def invariant(rank, size, folder):
    """Bits of a model with dropout after some steps, in grains."""
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3)).double() if size == 1 else None
    group = None if size == 1 else torch.distributed.group.WORLD
    if model is None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3)).double()
    optimizer = mb.AdamW(model.parameters(), lr=0.01)
    accumulator = mb.Accumulator(model, optimizer, loss, process_group=group, shared_batch=True, micro_batch=1 + size,
                                 grain=2, shard_optimizer=size == 3, clip_norm=1.0)
    reports = []
    for i, batch in enumerate(batches()):
        if i == 2:  # as after a restart
            state = accumulator.state_dict()
            assert len(state["ranges"]) == 4
            accumulator.load_state_dict(state)
        report = accumulator.step(batch)
        reports.append((report.loss, report.weight, report.gradient_norm))
    return state_of(model), reports


def save_and_go_on(case, rank, size, folder):
    """Four steps with sharded state, which rank 0 saves after two; then two by this number of processes."""
    def started(model):
        if "torch" in case:
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        else:
            optimizer = mb.AdamW(model.parameters(), lr=0.01)
        group = None if size == 1 else torch.distributed.group.WORLD
        return optimizer, mb.Accumulator(model, optimizer, loss, process_group=group, shared_batch=True, micro_batch=2,
                                         shard_optimizer=True)

    model = net()
    optimizer, accumulator = started(model)
    if size > 1:
        for batch in batches()[:2]:
            accumulator.step(batch)
        state = accumulator.whole_optimizer_state()
        assert (state is None) == (rank > 0)
        if rank == 0:
            torch.save((state, model.state_dict()), f"{folder}/state.pt")
        torch.distributed.barrier()
    state, weights = torch.load(f"{folder}/state.pt")
    model = net(seed=5)
    model.load_state_dict(weights)
    optimizer, accumulator = started(model)
    optimizer.load_state_dict(state)
    numbers = sum(one.numel() for values in state["state"].values() for one in values.values())
    assert (part_of_state(optimizer) < 0.8 * numbers) == (size > 1)
    for batch in batches()[2:]:
        accumulator.step(batch)
    return state_of(model), []


def take_over(rank, size, folder):
    model = net()
    optimizer = mb.AdamW(model.parameters(), lr=0.01)
    how = {"process_group": torch.distributed.group.WORLD, "shared_batch": True, "micro_batch": 2}
    accumulator = mb.Accumulator(model, optimizer, loss, shard_optimizer=True, **how)
    accumulator.step(batches()[0])
    said = []
    for call, words in ((optimizer.step, "its step() makes the update"),
                        (lambda: mb.Accumulator(model, optimizer, loss, **how), "sharded by another accumulator")):
        try:
            call()
        except mb.UsageError as error:
            said.append(words if words in str(error) else str(error))
    return state_of(model), said


def work(rank, size, folder, case):
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    try:
        if case == "invariant":
            made = invariant(rank, size, folder)
        elif case == "taken over":
            made = take_over(rank, size, folder)
        else:
            made = save_and_go_on(case, rank, size, folder) if "go on" in case else train(case, rank, size)
        torch.save(made, f"{folder}/{rank}.pt")
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def together(case, size, folder):
    folder.mkdir(exist_ok=True)
    context = torch.multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(rank, size, folder, case)) for rank in range(size)]
    for one in processes:
        one.start()
    for one in processes:
        one.join(60)
        assert one.exitcode == 0
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]


def assert_close(found, expected, tolerance):
    for name, one in expected.items():
        torch.testing.assert_close(found[name], one, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("case", ["whole", "own", "own torch", "causal_lm", "sharded", "own sharded", "torch sharded"])
def test_any_number_of_processes_makes_the_updates_of_one(case, size, tmp_path):
    expected, alone = train(case)
    # Sums of a few hundred terms in another order, over four steps.
    tolerance = 2e-6 if case == "causal_lm" else 1e-12
    for found, reports in together(case, size, tmp_path):
        assert_close(found, expected, tolerance)
        assert [one[1] for one in reports] == pytest.approx([one[1] for one in alone], rel=tolerance)
        assert [one[0] for one in reports] == pytest.approx([one[0] for one in alone], rel=10 * tolerance)
        assert all(one[3] for one in reports)


@pytest.mark.parametrize("case", ["go on", "go on torch"])
def test_a_whole_state_is_saved_and_any_number_of_processes_goes_on(case, tmp_path):
    model = net()
    optimizer = (torch.optim.AdamW if "torch" in case else mb.AdamW)(model.parameters(), lr=0.01)
    accumulator = mb.Accumulator(model, optimizer, loss, micro_batch=2)
    for batch in batches():
        accumulator.step(batch)
    for found, _ in together(case, 3, tmp_path):
        assert_close(found, state_of(model), 1e-9)  # AdamW scales up the rounding of gradients near 0
    assert_close(save_and_go_on(case, 0, 1, tmp_path)[0], state_of(model), 1e-9)


def test_grains_have_the_same_bits_for_any_number_of_processes(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected, alone = invariant(0, 1, tmp_path)
    finally:
        torch.set_num_threads(threads)
    for size in (2, 3):
        for found, reports in together("invariant", size, tmp_path / str(size)):
            assert all(torch.equal(found[name], one) for name, one in expected.items())
            assert reports == alone


def test_a_sharded_optimizer_is_not_stepped_by_itself_nor_by_another_accumulator(tmp_path):
    for found, reports in together("taken over", 2, tmp_path):
        assert reports == ["its step() makes the update", "sharded by another accumulator"]


def test_a_grain_that_is_none_is_refused():
    for grain in (-1, True, 1.5):
        with pytest.raises(mb.UsageError, match="grain is"):
            mb.Accumulator(net(), None, loss, grain=grain)


def test_state_is_not_sharded_without_an_optimizer():
    with pytest.raises(mb.UsageError, match="there is no state to shard"):
        mb.Accumulator(net(), None, loss, shard_optimizer=True)


def test_running_statistics_are_those_of_the_micro_batches_of_all(tmp_path):
    (first, _), (second, _) = together("norm", 2, tmp_path)
    assert all(torch.equal(one, second[name]) for name, one in first.items())
    assert first["1.num_batches_tracked"] == STEPS
    # Those of the first batch: the parameters are the same there, so what the layer sees is that of one process.
    model, (x, _, _) = net(norm=True), batches()[0]
    seen = model[0](x).detach()
    mean, variance = torch.zeros(8).double(), torch.ones(8).double()
    mean, variance = 0.9 * mean + 0.1 * seen.mean(0), 0.9 * variance + 0.1 * seen.var(0)
    (found, _), _ = together("norm once", 2, tmp_path / "once")
    torch.testing.assert_close(found["1.running_mean"], mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found["1.running_var"], variance, rtol=1e-12, atol=1e-12)


def test_what_is_not_finite_on_one_is_refused_on_all(tmp_path):
    found = together("nan", 2, tmp_path)
    for _, reports in found:
        assert [one[3] for one in reports] == [True, False, True, True]
        assert reports[1][4] == "loss is not finite"
    assert all(torch.equal(one, found[1][0][name]) for name, one in found[0][0].items())


def test_an_error_of_one_ends_all(tmp_path):
    (_, first), (_, second) = together("fails", 2, tmp_path)
    assert len(first) == 1 and first[0].startswith("rank 1 has failed: ZeroDivisionError: division by zero")
    assert second == ["division by zero"]


def test_a_wrapped_model_is_refused(tmp_path):
    with pytest.raises(mb.UsageError, match="wrapped in DataParallel, which sums gradients.*process_group="):
        mb.Accumulator(nn.DataParallel(net()), None, loss)


def test_something_else_is_no_group():
    with pytest.raises(mb.UsageError, match="process_group is a str; it is a group of torch.distributed"):
        mb.Accumulator(net(), None, loss, process_group="gloo")
