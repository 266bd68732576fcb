"""Steps beyond the bounds are refused, reported and logged; a run that diverges is stopped."""

import random
import statistics

import pytest

from conftest import FILES

# The rate rises until the loss climbs: sgd without clipping.
CLIMB = {"optimizer": "sgd", "momentum": 0, "weight_decay": 0, "clip": "inf", "schedule": "constant", "lr": 15,
         "warmup": "1500 steps", "steps": 1500, "batch": 4, "micro_batch": 4, "restores": 0}


@pytest.fixture(scope="module")
def climbing(shared_run):
    return shared_run.text("train", run="climbing", **CLIMB)


def test_a_run_whose_loss_climbs_is_stopped_with_the_weights_from_before(climbing):
    assert climbing.returncode == 4, climbing.stdout[-500:]
    assert "the run diverged at step" in climbing.stderr and "--lr" in climbing.stderr
    assert "stopped" in climbing.stdout
    last = climbing.metrics[-1]
    assert not last["applied"] and last["reason"]
    assert (climbing.folder / "model.safetensors").exists()


def test_every_refused_step_is_in_the_log_and_on_the_screen_with_its_reason(climbing):
    refused = [line for line in climbing.metrics if not line["applied"]]
    assert refused and refused[0]["step"] > 64
    for line in refused:
        assert line["reason"]
        assert f"step {line['step']}: refused: {line['reason']}" in climbing.stdout


def test_without_the_guard_the_same_run_goes_further(climbing, run):
    result = run.text("train", no_guard=True, **CLIMB)
    assert len(result.metrics) > len(climbing.metrics)
    assert all("not finite" in line["reason"] for line in result.metrics if not line["applied"])


def test_a_quiet_run_is_the_same_with_and_without_it(run):
    flags = {"steps": 200, "warmup": "10 steps", "lr": 0.003, "micro_batch": 8}
    with_guard = run.text("train", run="with", **flags).ok()
    without = run.text("train", run="without", no_guard=True, **flags).ok()
    assert all(with_guard.column("applied"))
    assert with_guard.weights == without.weights
    assert "no-guard = true" in (without.folder / "config.toml").read_text()


@pytest.mark.parametrize("place", ["in memory", "on disk"])
def test_a_run_that_diverges_rolls_back_and_continues_at_a_lower_rate(run, place):
    flags = CLIMB | {"restores": 2}
    if place == "on disk":
        plan = run.text("plan", json=True, batch=4, micro_batch=4, optimizer="sgd", momentum=0).ok().document
        flags["memory"] = f"{plan['candidates'][0]['measured_peak_bytes'] + 1000}B"
    result = run.text("train", json=True, **flags)
    back = [line for line in result.metrics if line["rolled_back_to"] is not None]
    assert back and back[0]["rolled_back_to"] <= back[0]["step"] - 16
    steps = result.column("step")
    assert steps == list(range(1, len(steps) + 1))
    after = result.metrics[back[0]["step"]]
    assert after["learning_rate"] < 0.1 * back[0]["learning_rate"]  # half, and the first step of a new warmup
    assert f"rolled back to the weights of step {back[0]['rolled_back_to']}" in result.stderr
    assert result.document["restores"] == len(back)
    assert place in result.stderr
    assert result.files == FILES
    if result.returncode == 4:
        assert "it had already rolled back 2 times" in result.stderr


def test_a_rate_that_is_far_too_large_is_detected_in_the_first_steps_and_not_used_again(run):
    result = run.text("train", lr=60, warmup="80 steps", steps=150, micro_batch=8, seed=5)
    metrics = result.metrics
    back = next(i for i, line in enumerate(metrics) if line["rolled_back_to"] is not None)
    assert back < 64
    limit = max(line["learning_rate"] for line in metrics[:back] if line["applied"]) / 2
    assert max(line["learning_rate"] for line in metrics[back + 1 :]) <= limit
    # Either the run is stopped, or it recovers and trains.
    assert result.returncode in (0, 4)
    if result.returncode == 0:
        assert statistics.median(line["loss"] for line in metrics[-16:]) < metrics[0]["loss"]


def test_a_run_that_ends_worse_than_it_began_says_so_and_ends_with_4(run):
    result = run.text("train", lr=10, schedule="constant", steps=40, micro_batch=8, no_guard=True)
    assert result.column("loss")[-1] > 3 * result.column("loss")[0]
    assert result.returncode == 4
    assert "the run ended worse than it began" in result.stderr and "--lr" in result.stderr
    assert "ended worse than it began" in (result.folder / "summary.json").read_text()
    assert len(result.metrics) == 40 and (result.folder / "model.safetensors").exists()


def test_a_run_that_overfits_is_warned_of_and_does_not_fail(run):
    noise = run.folder / "noise.txt"
    drawn = random.Random(1)
    noise.write_bytes(bytes(drawn.randrange(1, 256) for _ in range(400)))
    result = run.text("train", data=noise, width=64, lr=0.005, steps=200, micro_batch=8, no_guard=True).ok()
    assert result.column("loss")[-1] < 0.5 and "the model overfits" in result.stdout
