"""BatchNorm policies, and images so small that BatchNorm has a single value per channel in a micro-batch of one sample."""

import random
import struct

import pytest

SENTENCE = ["BatchNorm", "single value per channel", "micro-batch of at least 2"]


def write_tiny(folder, split, count):
    draw = random.Random(split)
    (folder / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, count, 4, 4) + draw.randbytes(16 * count))
    (folder / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, count) + bytes(i % 3 for i in range(count)))


@pytest.fixture
def tiny(run):
    """Runs a command on images of 4 x 4 and the default ResNet."""
    folder = run.folder / "tiny"
    folder.mkdir()
    write_tiny(folder, "train", 200)
    write_tiny(folder, "t10k", 40)
    return lambda command, **flags: run.images(command, data=folder, **{"norm": None, "layers": None} | flags)


@pytest.mark.parametrize("batch, smallest", [(64, 2), (33, 3), (2, 2), (3, 3)])
def test_the_plan_begins_at_the_smallest_micro_batch_that_can_be_trained_on(tiny, batch, smallest):
    document = tiny("plan", batch=batch, json=True).ok().document
    sizes = [each["micro_batch"] for each in document["candidates"]]
    assert min(sizes) == smallest and document["micro_batch"] >= smallest


def test_it_trains_and_is_verified_in_twos(tiny):
    result = tiny("train", batch=32).ok()
    assert "same gradients" in result.stdout and "BatchNorm exact" in result.stdout
    assert set(result.column("applied")) == {True}


@pytest.mark.parametrize("batch, micro_batch", [(33, 32), (33, 16), (9, 4), (33, 3)])
def test_no_sample_is_left_over(tiny, batch, micro_batch):
    result = tiny("train", batch=batch, micro_batch=micro_batch).ok()
    assert set(result.column("micro_batches")) == {-(-batch // micro_batch)}


def test_a_run_does_not_end_with_a_batch_of_one(tiny):
    assert tiny("train", batch=32, steps=None, samples=65).ok().column("batch") == [32, 31, 2]


@pytest.mark.parametrize("command", ["plan", "train"])
@pytest.mark.parametrize("flags", [{"batch": 1}, {"micro_batch": 1}])
def test_a_single_sample_is_refused_with_what_to_do(tiny, command, flags):
    result = tiny(command, **flags)
    assert result.returncode == 2 and all(words in result.stderr for words in SENTENCE), result.stderr
    assert "Expected more than" not in result.stderr


@pytest.mark.parametrize("memory", ["600KiB", "100KiB"])  # with the parameters alone, and without room for them
def test_memory_too_small_names_what_two_samples_need(tiny, memory):
    needed = tiny("plan", memory=memory, batch=64).misfit("micro-batch of 2 samples")
    assert sum(needed.values()) > 600 * 1024


def test_strategies_are_compared(tiny):
    document = tiny("compare", batch=16, samples=64, seeds=1, json=True).ok().document
    assert all(each["ran"] and each["micro_batch"] >= 2 for each in document["strategies"])


POLICIES = ["exact", "deferred", "frozen", "naive"]


@pytest.mark.parametrize("policy", POLICIES)
def test_the_policy_is_followed_named_and_recorded(tiny, policy):
    result = tiny("train", batch=16, micro_batch=4, batch_norm=policy, json=True).ok()
    assert result.document["batch_norm"] == policy
    assert f'batch-norm = "{policy}"' in (result.folder / "config.toml").read_text()
    plan = tiny("plan", batch=16, micro_batch=4, batch_norm=policy).ok()
    assert f"norm    BatchNorm {policy}: " in plan.stdout


def test_an_exact_batch_does_not_depend_on_the_cut(tiny):
    losses = [tiny("train", batch=16, batch_norm="exact", micro_batch=cut, run=f"cut-{cut}").ok().column("loss")
              for cut in (4, 6, 16)]
    # Rounding of fp32 sums, amplified by a few steps on tiny images.
    assert losses[0] == pytest.approx(losses[2], rel=1e-3) and losses[1] == pytest.approx(losses[2], rel=1e-3)


@pytest.mark.parametrize("policy, what", [("group", "GroupNorm (8 groups)"), ("rms", "RMSNorm over the channels")])
def test_layers_are_replaced_and_it_says_so(tiny, policy, what):
    result = tiny("train", batch=16, micro_batch=4, batch_norm=policy).ok()
    assert f"norm      every BatchNorm is replaced by {what}" in result.stdout and "same gradients" in result.stdout
    assert f'norm = "{policy}"' in (result.folder / "config.toml").read_text()
    again = tiny("train", batch=16, steps=8, resume=True).ok()
    assert again.column("step")[-1] == 8


@pytest.mark.parametrize("flags, words", [
    ({"model": "mlp", "batch_norm": "exact"}, ["--batch-norm exact", "mlp", "no BatchNorm layer"]),
    ({"norm": "group", "batch_norm": "deferred"}, ["--batch-norm deferred", "--norm group", "no BatchNorm layer"]),
    ({"batch_norm": "exat"}, ["--batch-norm exat", "auto, exact, deferred"])])
def test_a_policy_that_cannot_be_is_refused_in_one_line(tiny, flags, words):
    result = tiny("plan", batch=16, **flags)
    assert result.returncode == 2 and all(word in result.stderr for word in words), result.stderr
    assert result.stderr.count("\n") == 1
