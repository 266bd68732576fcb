"""Out of memory in the middle of a run: the step is undone and repeated in smaller micro-batches, with no trace."""

import re

import pytest

from conftest import DEEP, chosen_of, weights_file

TINY = {"heads": 1, "width": 16, "batch": 8, "micro_batch": 8, "recompute": "never"}
DRILL = "MICROBATCH_BUDGET_DRILL"


@pytest.fixture
def drilled(run, monkeypatch):
    """Train, with another budget after a step."""

    def train(step, size, **flags):
        monkeypatch.setenv(DRILL, f"{step} {size}")
        result = run.text("train", **TINY | {"memory": "8MiB"} | flags)
        monkeypatch.delenv(DRILL)
        return result

    return train


@pytest.fixture
def undrilled(run):
    return lambda **flags: run.text("train", **TINY | {"memory": "8MiB"} | flags).ok()


def halfway(run, smaller, larger):
    """Between the needs of two micro-batch sizes."""
    peaks = [chosen_of(run.text("plan", json=True, **TINY | {"steps": None, "memory": "8MiB"} | cut).ok().document)
             ["measured_peak_bytes"] for cut in (smaller, larger)]
    assert peaks[0] < peaks[1]
    return sum(peaks) // 2


@pytest.mark.parametrize("dropout", [0, 0.1])
def test_a_repeated_step_equals_that_of_a_run_with_the_smaller_micro_batch(run, drilled, undrilled, dropout):
    # With a learning rate of 0, the first step, which is split differently, leaves the same weights: the rest is equal.
    flags = {"dropout": dropout, "lr": 0, "steps": 4}
    budget = halfway(run, {"micro_batch": 4}, {"micro_batch": 8})
    fallen = drilled(1, budget, **flags, run="fallen").ok()
    smaller = undrilled(**flags, micro_batch=4, run="smaller")
    assert fallen.column("micro_batch") == [8, 4, 4, 4] and fallen.column("out_of_memory") == [0, 1, 0, 0]
    for name in ("loss", "gradient_norm", "micro_batches"):
        assert fallen.column(name)[1:] == smaller.column(name)[1:] and fallen.column(name)[0] != smaller.column(name)[0]
    assert max(fallen.column("peak_bytes")[1:]) <= budget
    assert weights_file(fallen) == weights_file(smaller)


@pytest.mark.parametrize("dropout", [0, 0.1])
def test_a_run_that_falls_back_to_recompute_ends_with_the_same_weights(run, drilled, undrilled, dropout):
    flags = DEEP | {"dropout": dropout, "micro_batch": 1, "steps": 5, "recompute": "auto", "memory": "8MiB"}
    budget = halfway(run, DEEP | {"micro_batch": 1, "recompute": "always"}, DEEP | {"micro_batch": 1})
    fallen = drilled(2, budget, **flags, run="fallen").ok()
    whole = undrilled(**flags, run="whole")
    assert fallen.column("recompute") == [False, False, True, True, True] and set(whole.column("recompute")) == {False}
    assert fallen.column("loss") == whole.column("loss")
    assert weights_file(fallen) == weights_file(whole)


def test_it_does_not_matter_where_in_the_step_memory_ran_out(run, drilled):
    """In the first micro-batch or a later one, in forward or backward: the partial step leaves no trace."""
    flags = {"batch": 16, "steps": 3, "dropout": 0.1}
    small, large = ({"batch": 16, "micro_batch": size} for size in (4, 8))
    middle = halfway(run, small, large)
    phases = chosen_of(run.text("plan", json=True, **TINY | {"memory": "8MiB"} | large).ok().document)["phases"]
    assert phases["first_micro_batch"] < phases["later_micro_batches"]
    later = (phases["first_micro_batch"] + phases["later_micro_batches"]) // 2
    runs = [drilled(1, budget, **flags, run=str(budget)).ok() for budget in (middle - 20_000, middle, later)]
    assert all(result.column("micro_batch") == [8, 4, 4] for result in runs)
    assert len({weights_file(result) for result in runs}) == 1


def test_a_run_may_reduce_the_micro_batch_several_times_in_a_step(run, drilled):
    budget = halfway(run, {"micro_batch": 1}, {"micro_batch": 2})
    result = drilled(1, budget, steps=3).ok()
    # 4, 2, 2 with recompute, 1.
    assert result.column("micro_batch") == [8, 1, 1] and result.column("out_of_memory") == [0, 4, 0]
    assert all(line["applied"] for line in result.metrics)


def test_a_run_that_reduces_the_micro_batch_says_so(run, drilled):
    budget = halfway(run, {"micro_batch": 4}, {"micro_batch": 8})
    result = drilled(2, budget, steps=4, json=True).ok()
    assert "step 3: out of memory" in result.stderr and "micro-batches of 4" in result.stderr
    assert re.search(r"^retried +1 ", result.stderr, re.MULTILINE)
    told = result.document
    assert (told["micro_batch"], told["out_of_memory"], told["steps"]) == (4, 1, 4) and "\x1b" not in result.stderr


@pytest.mark.parametrize("size", ["110KiB", "150KiB"])
def test_memory_that_runs_out_at_a_micro_batch_of_one_ends_the_run_with_its_weights(run, drilled, undrilled, size):
    flags = {"schedule": "constant", "dropout": 0.1}
    result = drilled(2, size, steps=5, run="ended", **flags)
    result.refused(3, "out of memory with a micro-batch of 1 sample", size.replace("K", " K"))
    assert result.column("step") == [1, 2] and (result.folder / "config.toml").exists()
    # Every parameter as after the second step, which is where a run of two steps ends.
    assert weights_file(result) == weights_file(undrilled(steps=2, run="two", **flags))


def test_plan_of_a_run_that_reduced_the_micro_batch_has_a_row_for_each_split(run, drilled):
    budget = halfway(run, {"micro_batch": 4}, {"micro_batch": 8})
    trained = drilled(2, budget, steps=5).ok()
    rows = {row["micro_batch"]: row for row in run("plan", "--run", "run", "--json").ok().document}
    assert {size: (row["steps"], row["out_of_memory"]) for size, row in rows.items()} == {8: (2, 0), 4: (3, 1)}
    assert rows[8]["measured_peak_bytes"] == max(trained.column("peak_bytes")[:2])
    assert rows[4]["measured_peak_bytes"] == max(trained.column("peak_bytes")[2:]) <= budget
    # Of micro-batches of 4 nothing was predicted, or what they need: never what those of 8 would have needed.
    assert rows[4]["predicted_peak_bytes"] in (None, pytest.approx(rows[4]["measured_peak_bytes"], rel=0.03))
