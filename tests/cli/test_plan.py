"""The output of `plan` is measured, consistent, and matches what `train` does."""

import math
import re

import pytest

from conftest import chosen_of


@pytest.fixture(scope="module")
def plan(shared_paced):
    return shared_paced.text("plan", batch=64, memory="3MiB", json=True).ok().document


def test_the_document_has_the_choice_and_every_candidate(plan):
    assert {"model", "batch", "budget_bytes", "micro_batch", "micro_batches", "candidates"} <= set(plan)
    assert (plan["batch"], plan["budget_bytes"]) == (64, 3 * 2**20)
    assert plan["micro_batch"] in [each["micro_batch"] for each in plan["candidates"]]
    assert plan["micro_batches"] == math.ceil(64 / plan["micro_batch"])


def peak_of(candidate):
    """Measured where it was tried, predicted elsewhere."""
    return candidate["measured_peak_bytes"] or candidate["predicted_peak_bytes"]


def test_candidates_are_reported_to_fit_exactly_when_they_do(plan):
    assert {each["fits"] for each in plan["candidates"]} == {True, False}
    for each in plan["candidates"]:
        assert each["fits"] == (peak_of(each) <= plan["budget_bytes"])
        assert each["micro_batches"] == math.ceil(64 / each["micro_batch"])
        if each.get("measured_peak_bytes") is not None:
            assert each["measured_peak_bytes"] <= plan["budget_bytes"]


def test_larger_micro_batches_are_predicted_to_need_more(plan):
    for recompute in (False, True):
        rows = [(each["micro_batch"], peak_of(each)) for each in plan["candidates"] if each["recompute"] is recompute]
        assert len(rows) > 3 and rows == sorted(rows) and len({peak for _, peak in rows}) == len(rows)
        # What the whole batch would need is told, too, though it does not fit.
        assert rows[-1][0] == 64


def test_the_chosen_one_fits_and_is_about_the_fastest_measured(plan):
    chosen = next(each for each in plan["candidates"]
                  if (each["micro_batch"], each["recompute"]) == (plan["micro_batch"], plan["recompute"]))
    # Nothing is predicted of those that are measured first: they are what is predicted from.
    predicted = chosen["predicted_peak_bytes"]
    assert chosen["fits"] and predicted in (None, pytest.approx(chosen["measured_peak_bytes"], rel=0.05))
    times = [each["step_seconds"] for each in plan["candidates"] if each["fits"] and each["time_measured"]]
    assert chosen["step_seconds"] <= 1.1 * min(times)  # a tenth: of two that are equally fast either is right


def test_the_table_marks_one_row(run):
    lines = run.text("plan", batch=64, memory="3MiB").ok().stdout.splitlines()
    head = next(line for line in lines if "micro-batches" in line and "predicted peak" in line)
    assert [name for name in ("measured peak", "time per step", "fits") if name not in head] == []
    table = lines[lines.index(head) + 1 :][: lines[lines.index(head) :].index("") - 1]
    chosen = [line.split() for line in table if line.startswith("chosen")]
    assert len(chosen) == 1 and chosen[0][-1] == "yes"
    assert int(chosen[0][2]) == math.ceil(64 / int(chosen[0][1]))
    assert any(line.split()[:1] == ["64"] and line.endswith("no") for line in table)


@pytest.mark.parametrize("size", [1, 2])
def test_train_uses_what_plan_chose(paced, size):
    # A budget in which this size fits, but one larger does not. Two at once are twice as fast as one by one.
    rows = paced.text("plan", batch=64, memory="2MiB", json=True).ok().document["candidates"]
    peaks = {each["micro_batch"]: each["measured_peak_bytes"] for each in rows}
    budget = f"{int(peaks[size] + 0.25 * (peaks[2] - peaks[1]))}B"
    chosen = paced.text("plan", batch=64, memory=budget, json=True).ok().document["micro_batch"]
    trained = paced.text("train", batch=64, memory=budget, json=True).ok()
    assert chosen == trained.document["micro_batch"] == size
    assert set(trained.column("micro_batch")) == {size}


def test_a_given_micro_batch_is_the_one_that_is_planned(run):
    document = run.text("plan", batch=64, micro_batch=5, json=True).ok().document
    assert (document["micro_batch"], document["micro_batches"]) == (5, 13)


def test_a_batch_of_one_can_be_planned(run):
    assert run.text("plan", batch=1, json=True).ok().document["micro_batch"] == 1


def test_images_can_be_planned(run):
    document = run.images("plan", batch=32, memory="4MiB", json=True).ok().document
    assert document["model"] == "resnet" and 1 <= document["micro_batch"] < 32


def test_without_a_budget_the_free_memory_of_the_machine_is_used(run):
    with open("/proc/meminfo") as file:
        total = int(next(line for line in file if line.startswith("MemTotal")).split()[1]) * 1024
    assert 0 < run.text("plan", memory=None, json=True).ok().document["budget_bytes"] < total


def test_planning_writes_nothing(run):
    run.text("plan").ok()
    assert list(run.folder.iterdir()) == []


def test_the_peak_is_reported_by_phase_and_by_part(run):
    document = run.text("plan", json=True).ok().document
    chosen = chosen_of(document)
    assert list(chosen["parts"]) == ["parameters", "gradients", "optimizer_state", "activations", "other"]
    assert list(chosen["phases"]) == ["first_micro_batch", "later_micro_batches", "first_update", "later_updates"]
    assert max(chosen["phases"].values()) == peak_of(chosen)
    told = run.text("plan").ok().stdout
    for name in [*chosen["parts"], *chosen["phases"]]:
        if chosen["parts"].get(name, chosen["phases"].get(name)) > 0:
            assert re.search(rf"^  {name.replace('_', '[ -]')} +[\d.]+ [KM]?i?B$", told, re.MULTILINE), name
