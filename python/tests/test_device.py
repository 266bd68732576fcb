"""Models on an accelerator: the fake one, which ends the process where the host touches its memory."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import microbatch as mb
from microbatch import losses
from microbatch.devices import OnDevice
import models
from conftest import load_fake_device

FAKE = load_fake_device()
MOST_READS = 3  # a step


def make(seed=1, dropout=0.0):
    torch.manual_seed(seed)
    layers = nn.Linear(6, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Dropout(dropout), nn.Linear(32, 4)
    return nn.Sequential(*layers).to("fake")


def loss(model, micro):
    x, y = micro
    return functional.cross_entropy(model(x), y, reduction="sum"), (y >= 0).sum()


def batch(samples=16, device="cpu"):
    torch.manual_seed(2)
    return torch.randn(samples, 6).to(device), torch.randint(4, (samples,)).to(device)


def reads_of(call):
    FAKE.fake_reset_counts()
    call()
    return FAKE.fake_host_reads()


@pytest.fixture(autouse=True)
def _whole_memory():
    yield
    mb.memory.set_budget(None, "fake")
    FAKE.fake_set_memory(1 << 30)


@pytest.mark.parametrize("policy", ["naive", "deferred", "exact"])
def test_a_batch_on_the_host_gives_the_update_of_one_on_the_device(policy):
    ends = []
    for device in ("cpu", "fake"):
        model = make()
        accumulator = mb.Accumulator(model, mb.AdamW(model.parameters()), loss, micro_batch=5, batch_norm=policy)
        for _ in range(3):
            assert accumulator.step(batch(device=device)).applied
        ends.append([one.detach().cpu() for one in model.state_dict().values()])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


def test_the_update_is_that_of_the_same_model_on_the_cpu():
    results = []
    for device in ("cpu", "fake"):
        model = make().to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        accumulator = mb.Accumulator(model, optimizer, loss, micro_batch=5, clip_norm=1.0)
        reports = [accumulator.step(batch()) for _ in range(4)]
        results.append(([one.loss for one in reports], [one.detach().cpu() for one in model.parameters()]))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("policy", ["naive", "deferred", "exact"])
@pytest.mark.parametrize("optimizer", [mb.AdamW, mb.SGD, torch.optim.AdamW, torch.optim.SGD])
def test_nothing_waits_for_the_device_in_a_micro_batch(policy, optimizer):
    model = make()
    accumulator = mb.Accumulator(model, optimizer(model.parameters(), lr=1e-2), loss, batch_norm=policy, clip_norm=1.0)
    found = []
    for micro_batch in (8, 2):
        accumulator.plan = mb.Plan(micro_batch, batch_norm=policy)
        accumulator.step(batch())
        found.append(reads_of(lambda: accumulator.step(batch())))
        assert FAKE.fake_blocking_uploads() == 0
    assert found[0] == found[1] <= MOST_READS


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5"])
def test_losses_of_hugging_face_models_wait_for_nothing(name):
    model, data, function = models.EXACT[name]()
    model = model.to("fake")
    accumulator = mb.Accumulator(model, mb.AdamW(model.parameters()), function, micro_batch=2)
    data = {key: value.to("fake") for key, value in data.items()}
    accumulator.step(data)
    ours = reads_of(lambda: accumulator.step(data))
    samples = len(data["labels"])
    micro_batches = [{key: value[i : i + 2] for key, value in data.items()} for i in range(0, samples, 2)]
    theirs = reads_of(lambda: [model(**micro) for micro in micro_batches])  # the models look at their masks
    assert ours - theirs <= MOST_READS


def test_a_weight_from_a_mean_is_read_once_a_micro_batch():
    model = make()
    mean = losses.from_mean(
        lambda model, micro: functional.cross_entropy(model(micro[0]), micro[1]), lambda micro: (micro[1] >= 0).sum()
    )
    accumulator = mb.Accumulator(model, mb.SGD(model.parameters()), mean, micro_batch=4, batch_norm="naive")
    accumulator.step(batch())
    assert reads_of(lambda: accumulator.step(batch())) <= MOST_READS + 4


def test_a_plan_is_for_the_memory_of_the_device():
    model = make()
    accumulator = mb.Accumulator(model, mb.AdamW(model.parameters()), loss, memory="64MiB", batch_norm="naive")
    report = accumulator.step(batch(64))
    assert accumulator.last_plan.budget_bytes == 64 << 20
    assert report.peak_bytes == mb.memory.peak("fake") > 0
    assert mb.memory.stats("fake").peak_reserved_bytes >= report.peak_bytes


def test_a_prediction_is_what_is_measured():
    model = nn.Sequential(nn.Linear(6, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 4)).to("fake")
    accumulator = mb.Accumulator(model, mb.AdamW(model.parameters()), loss, micro_batch=32)
    accumulator.make_plan(batch(256, "fake"))
    accumulator.step(batch(256, "fake"))
    measured = accumulator.step(batch(256, "fake")).peak_bytes
    assert measured == pytest.approx(accumulator.last_plan.chosen.peak_bytes, rel=0.01)


def test_a_budget_is_the_limit_of_the_allocator():
    before = mb.memory.set_budget("1MiB", "fake")
    assert FAKE.fake_memory() == pytest.approx(1 << 20, abs=1024)
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(1 << 20, device="fake")
    assert before is None
    with mb.memory.budget("2MiB", "fake"):
        torch.empty(1 << 18, device="fake")
    assert mb.memory.stats("fake").budget_bytes == 1 << 20


def test_a_batch_that_runs_out_is_made_with_a_smaller_micro_batch():
    ends = []
    for fails in (True, False):
        model = make(dropout=0.1)
        micro_batch = 16 if fails else 8
        accumulator = mb.Accumulator(
            model, mb.AdamW(model.parameters()), loss, micro_batch=micro_batch, batch_norm="naive")
        if fails:
            FAKE.fake_fail_allocation(20)
        report = accumulator.step(batch())
        assert report.applied and report.out_of_memory == int(fails) and report.plan.micro_batch == 8
        ends.append([one.detach().cpu() for one in model.state_dict().values()])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


def test_what_does_not_fit_says_so_and_changes_nothing():
    model = nn.Linear(6, 4).to("fake")
    accumulator = mb.Accumulator(model, mb.AdamW(model.parameters()), loss, micro_batch=4)
    before = [one.detach().cpu() for one in model.state_dict().values()]
    with mb.memory.budget(mb.memory.stats("fake").live_bytes + 1024, "fake"):
        with pytest.raises(mb.DoesNotFit, match="out of memory with a micro-batch of"):
            accumulator.step(batch())
    assert all(torch.equal(one, other.cpu()) for one, other in zip(before, model.state_dict().values(), strict=True))


def test_a_run_on_the_device_is_resumed(tmp_path):
    data = [(x, y) for x, y in zip(*batch(32), strict=True)]
    ends = []
    for stops in ((6,), (2, 6)):
        folder = tmp_path / str(len(stops))
        for steps in stops:
            model = make(dropout=0.1)
            trainer = mb.Trainer(model, data, loss, batch=8, micro_batch=4, steps=6, run=folder, resume=True, lr=1e-2,
                                 checkpoint_every=1, batch_norm="deferred", warmup=0)
            seen = []

            def stop(line, steps=steps, seen=seen):
                seen.append(line)
                if len(seen) == steps and steps < 6:
                    raise KeyboardInterrupt

            try:
                trainer.train(on_step=stop)
            except KeyboardInterrupt:
                continue
        ends.append([one.detach().cpu() for one in model.state_dict().values()])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


def test_wrong_devices_are_named():
    with pytest.raises(mb.UsageError, match="there is no device cuda:7 here: there is cpu, fake:0"):
        mb.memory.set_budget("1GiB", "cuda:7")
    with pytest.raises(mb.UsageError, match="the memory budget is 4 GiB, and the device fake:0 has 1 GiB"):
        mb.memory.set_budget("4GiB", "fake")
    model = make()
    with pytest.raises(mb.UsageError, match="4 GiB.*fake:0 has 1 GiB"):
        mb.Accumulator(model, mb.AdamW(model.parameters()), loss, memory="4GiB")
    accumulator = mb.Accumulator(make().cpu(), None, loss, micro_batch=4)
    with pytest.raises(mb.UsageError, match="the model is on cpu, and the batch on fake:0"):
        accumulator.gather(batch(device="fake"))


def test_verify_finds_on_the_device_what_it_finds_on_the_cpu():
    found = mb.verify(make(), batch(), loss, batch_norm="naive")
    assert [cause.name for cause in found.causes] == ["batch_statistics"]
    assert not mb.verify(make(), batch(), loss, batch_norm="exact").causes


def test_a_micro_batch_that_is_partly_on_the_device_is_left_as_it_is():
    model = nn.Linear(6, 4).to("fake")
    seen = []

    def looking(model, micro):
        seen.append((micro["x"].device.type, micro["lengths"].device.type))
        return model(micro["x"]).square().sum(), 1.0

    accumulator = mb.Accumulator(model, mb.SGD(model.parameters()), looking, micro_batch=2)
    accumulator.step({"x": torch.randn(4, 6).to("fake"), "lengths": torch.ones(4)})
    accumulator.step({"x": torch.randn(4, 6), "lengths": torch.ones(4)})
    assert seen == [("fake", "cpu")] * 2 + [("fake", "fake")] * 2


def test_the_sizes_of_a_packed_sequence_stay_on_the_host():
    packed = nn.utils.rnn.pack_sequence([torch.randn(3, 2), torch.randn(2, 2)])
    moved = OnDevice(torch.device("fake"))({"x": packed, "y": torch.ones(2)})
    assert moved["x"].data.device.type == moved["y"].device.type == "fake"
    assert moved["x"].batch_sizes.device.type == "cpu"
    assert torch.equal(moved["x"].data.cpu(), packed.data)


def test_zeros_without_a_graph_are_a_micro_batch_of_weight_zero():
    model = nn.Linear(6, 4).to("fake")

    def masked(model, micro):
        x, keep = micro
        if calls.pop():
            return torch.zeros((), device="fake"), (keep * 0).sum()
        return model(x).square().sum(), keep.sum()

    accumulator = mb.Accumulator(model, mb.SGD(model.parameters()), masked, micro_batch=2)
    calls = [False, True]
    assert accumulator.step((torch.randn(4, 6), torch.ones(4))).weight == 2.0
