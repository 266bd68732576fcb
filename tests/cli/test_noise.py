"""The gradient noise is measured while a run trains, and turned into advice."""

import math
import re

import pytest

CUT = {"batch": 16, "micro_batch": 4}


@pytest.fixture(scope="module")
def advised(shared_run):
    return shared_run.text("advise", json=True, **CUT | {"steps": 20}).ok()


# In a run

def test_noise_is_measured_every_so_many_steps(run):
    result = run.text("train", steps=7, noise_every=3, **CUT).ok()
    measured = [line["gradient_variance"] is not None for line in result.metrics]
    assert measured == [True, False, False, True, False, False, True]
    for line in result.metrics:
        assert (line["squared_gradient"] is None) == (line["gradient_variance"] is None)
        assert line["gradient_variance"] is None or line["gradient_variance"] > 0
    assert "measured every 3 steps" in result.stdout


def test_noise_and_gradient_make_up_the_gradient_norm(run):
    # |g|^2 = |G|^2 + tr(Sigma) / B, by what they are.
    line = run.text("train", steps=1, noise_every=1, **CUT).ok().metrics[0]
    assert line["squared_gradient"] + line["gradient_variance"] / line["weight"] == pytest.approx(
        line["gradient_norm"] ** 2, rel=1e-9)


def test_measuring_changes_no_bit_of_the_run(run):
    flags = CUT | {"steps": 6, "dropout": 0.1}
    with_noise = run.text("train", noise_every=1, run="with", **flags).ok()
    without = run.text("train", noise_every=0, run="without", **flags).ok()
    assert with_noise.column("loss") == without.column("loss")
    assert with_noise.weights == without.weights
    assert set(without.column("gradient_variance")) == {None} and set(without.column("noise_batch")) == {None}


@pytest.mark.parametrize("job, flags", [("text", {"layers": 2, "width": 64}), ("images", {}), ("images", {"norm": "batch"})])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_peak_of_every_step_is_predicted_including_noise_and_snapshots(run, job, flags, optimizer):
    for noise_every in (1, 2, 0):
        result = getattr(run, job)("train", steps=35, run=str(noise_every), optimizer=optimizer, noise_every=noise_every,
                                   **CUT | flags).ok()
        # The first step makes the optimizer's state; the prediction is that of the run.
        for line in result.metrics[1:]:
            assert line["predicted_peak_bytes"] == pytest.approx(line["peak_bytes"], rel=0.03), line
        assert result.metrics[0]["predicted_peak_bytes"] >= 0.97 * result.metrics[0]["peak_bytes"]
        # A second snapshot after 32 steps.
        assert result.metrics[33]["peak_bytes"] > result.metrics[31 - 1]["peak_bytes"]


def test_if_a_copy_of_the_gradients_does_not_fit_it_says_so(run):
    plan = run.text("plan", json=True, micro_batch=8, batch=16, layers=4).ok().document
    peak = next(each["measured_peak_bytes"] for each in plan["candidates"])
    result = run.text("train", batch=16, micro_batch=8, layers=4, memory=f"{peak + 1000}B", steps=3).ok()
    assert re.search(r"not measured: a copy of the gradients needs [\d.]+ KiB more", result.stdout)
    assert max(result.column("peak_bytes")) <= peak + 1000 and set(result.column("out_of_memory")) == {0}


def test_one_micro_batch_does_not_show_noise(run):
    result = run.text("train", batch=8, micro_batch=8).ok()
    assert "noise needs two" in result.stdout and set(result.column("gradient_variance")) == {None}


# Advice

def test_the_table_follows_from_the_noise(advised):
    told = advised.document
    noise = told["noise_batch"]
    assert noise > 0 and told["measures"] == 20
    for row in told["batches"]:
        assert row["relative_steps"] == pytest.approx(1 + noise / row["batch"])
        assert row["relative_samples"] == pytest.approx(1 + row["batch"] / noise)
        assert row["micro_batch"] <= row["batch"] and row["relative_time"] >= 1
        assert row["learning_rate"]["sqrt"] == pytest.approx(1e-3 * math.sqrt(row["batch"] / 16))
    soonest = next(row for row in told["batches"] if row["relative_time"] == 1)
    assert told["soonest_batch"] == soonest["batch"] and told["accumulation_pays"] in (True, False)
    assert any(row["learning_rate"]["adam-sde"] is None for row in told["batches"]) == (told["batches"][-1]["batch"] >= 160)


def test_it_says_what_to_do_in_words(run):
    result = run.text("advise", **CUT | {"steps": 20}).ok()
    for word in ("fewest steps", "fewest samples", "knee", "fastest", "accumulation", "time to reach the same loss"):
        assert word in result.stdout
    assert "\x1b" not in result.stdout and list(run.folder.iterdir()) == []


@pytest.mark.parametrize("flags", [{}, {"schedule": "wsd", "decay": "2 steps"}, {"schedule": "polynomial", "power": 3},
                                   {"final_lr": 0.0001}], ids=["cosine", "wsd", "polynomial", "final rate"])
def test_the_configuration_of_a_run_is_advised_on_at_a_constant_rate(run, flags):
    run.text("train", steps=4, **CUT | flags).ok()
    told = run("advise", "--config", "run/config.toml", "--json").ok().document
    assert told["batch"] == 16 and told["measures"] == 4


def test_check_tries_larger_batches_and_says_which_is_as_good(run):
    told = run.text("advise", check=True, json=True, batch=2, micro_batch=1, lr=0.003, steps=20).ok().document
    assert [branch["batch"] for branch in told["branches"]] == [2, 4, 8, 16]
    assert told["branches"][0]["as_good"] is True
    assert [branch["learning_rate"] for branch in told["branches"]] == pytest.approx([0.003 * 2 ** (i / 2) for i in range(4)])


@pytest.fixture
def nine(run):
    """Text of nine samples to train on."""
    file = run.folder / "nine.txt"
    file.write_bytes(run.data.text.read_bytes()[:170])
    return file


@pytest.mark.parametrize("batch, words", [(16, ["times"]), (4, ["%"])])
def test_data_too_small_for_advice_is_refused(run, nine, batch, words):
    run.text("advise", data=nine, batch=batch).refused(2, "too small to measure the noise", f"batch of {batch}", "samples", *words)


def test_a_batch_larger_than_the_run_is_not_advised_on(run):
    run.text("advise", steps=None, samples=10, batch=16).refused(2, "batch of 16", "10 samples")


def test_no_batch_larger_than_the_data_is_recommended_or_tried(run, data):
    small = run.folder / "small.txt"
    small.write_bytes(data.text.read_bytes()[:2000])
    result = run.text("advise", data=small, check=True, json=True, batch=4, micro_batch=1, steps=20).ok()
    samples = result.document["data_samples"]
    assert 64 < samples < 256
    assert all(row["batch"] <= samples for row in result.document["batches"])
    assert [branch["batch"] for branch in result.document["branches"]] == [4, 8]
    again = run.text("advise", data=small, check=True, json=True, batch=samples // 10, micro_batch=1, steps=20).ok()
    assert again.document["branches"] == [] and "critical" not in again.stderr
    assert re.search(r"check +skipped: 8 steps at twice the batch need \d+ samples, and the data has \d+", again.stderr)


def test_a_batch_that_cannot_be_split_is_refused(run):
    run.text("advise", batch=1).refused(2, "--batch 1", "two micro-batches")
