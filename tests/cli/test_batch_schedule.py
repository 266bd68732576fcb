"""A batch that grows during a run: memory and micro-batch do not change, and the rule scales the rate."""

import pytest

GROWING = {"batch": None, "batch_schedule": "4 at 0, 8 at 12 samples, 16 at 40 samples", "steps": None, "samples": 88}


@pytest.fixture(scope="module")
def growing(shared_run):
    return shared_run.text("train", run="growing", lr=0.01, schedule="constant", **GROWING).ok()


def test_every_step_has_the_batch_of_its_stage(growing):
    assert growing.column("batch") == [4, 4, 4, 8, 8, 8, 8, 16, 16, 12]
    assert growing.metrics[-1]["samples"] == 88


def test_the_micro_batch_does_not_change_and_the_memory_is_as_predicted(growing):
    assert len(set(growing.column("micro_batch"))) == 1 and growing.metrics[0]["micro_batch"] <= 4
    assert growing.metrics[-1]["predicted_peak_bytes"] == pytest.approx(growing.metrics[-1]["peak_bytes"], rel=0.03)


def test_the_rate_is_scaled_by_the_optimizers_default_rule(growing):
    rates = growing.column("learning_rate")
    assert rates[0] == pytest.approx(0.01) and rates[3] == pytest.approx(0.01 * 2**0.5)
    assert rates[7] == pytest.approx(0.02)
    assert "4 at 0 steps, 8 at 12 samples" in growing.stdout and "by the rule sqrt" in growing.stdout


@pytest.mark.parametrize("rule, factor", [("linear", 4), ("none", 1)])
def test_the_rate_is_scaled_by_the_requested_rule(run, rule, factor):
    result = run.text("train", lr=0.01, schedule="constant", lr_rule=rule, **GROWING).ok()
    assert result.column("learning_rate")[-2] == pytest.approx(0.01 * factor)


def test_the_configuration_that_is_written_gives_the_same_run(run, growing):
    again = run("train", "--config", growing.folder / "config.toml", "--run", "run").ok()
    assert (again.folder / "model.safetensors").read_bytes() == (growing.folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("words", [["plan"], ["compare", "--samples", "16", "--seeds", "1"], ["advise", "--steps", "2"]],
                         ids=["plan", "compare", "advise"])
def test_other_commands_read_that_configuration_too(run, growing, words):
    run(*words, "--config", growing.folder / "config.toml", "--json").ok()


def test_seesaw_doubles_the_batch_where_the_rate_has_halved(run):
    result = run.text("train", batch=4, batch_schedule="seesaw to 16", schedule="linear", lr=0.01, steps=None,
                      samples=200, memory="64MiB").ok()
    batches, rates = result.column("batch"), result.column("learning_rate")
    assert batches[0] == 4 and 8 in batches and max(batches) == 16 and batches[:-1] == sorted(batches[:-1])
    # Halved by the schedule, times sqrt(2).
    assert rates[batches.index(8)] == pytest.approx(0.01 * 0.5 * 2**0.5, rel=0.05)
    assert result.metrics[-1]["samples"] == 200


@pytest.mark.parametrize("flags, words", [
    ({"batch_schedule": "4 at 0, 2 at 8 samples", "micro_batch": 4, "batch": None}, ["--batch-schedule", "2", "below --micro-batch 4"]),
    ({"batch_schedule": "4 at 0, 0 at 8 samples", "batch": None}, ["--batch-schedule", "0", "at least 1"]),
    ({"batch_schedule": "4 at 3 steps", "batch": None}, ["--batch-schedule", "start"]),
    ({"batch_schedule": "4", "batch": None}, ["--batch-schedule", "invalid stage"]),
    ({"batch_schedule": "4 at 0", "batch": 8}, ["--batch 8", "--batch-schedule"]),
    ({"batch_schedule": "seesaws"}, ["--batch-schedule", "seesaw"]),
    ({"batch_schedule": "seesaw to many"}, ["--batch-schedule", "many"]),
    ({"batch_schedule": "seesaw to 4"}, ["--batch-schedule", "4", "8"]),
    ({"batch_schedule": "seesaw"}, ["--batch-schedule", "steps"]),
    ({"batch_schedule": "seesaw", "schedule": "constant", "steps": None, "samples": 99}, ["--batch-schedule", "fall"]),
    ({"batch_schedule": "4 at 0, 8 at 8 samples", "batch": None, "lr_rule": "adam-sde"}, ["adam-sde", "--batch-schedule"]),
    ({"batch_schedule": "4 at 0, 8 at 8 samples", "batch": None, "reference_batch": 0}, ["--reference-batch", "0"]),
])
def test_an_invalid_schedule_is_refused(run, flags, words):
    run.text("train", **flags).refused(2, *words)
    assert not (run.folder / "run").exists()


def test_other_commands_do_not_accept_it(run, data):
    run("plan", "--data", data.text, "--batch-schedule", "4 at 0").refused(2, "--batch-schedule", "train")
