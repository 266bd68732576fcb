"""Memory is predicted, limited and explained: the plan of micro-batch x recompute, out of memory, nothing fits."""

import math
import re

import pytest
import tomllib

from conftest import DEEP, PARTS, chosen_of, in_bytes, weights_file

COLUMNS = ["micro-batch", "micro-batches", "recompute", "predicted peak", "measured peak", "time per step", "fits"]


def peak_of(candidate):
    """Measured where it was tried, predicted elsewhere; none where too little is known."""
    return candidate["measured_peak_bytes"] or candidate["predicted_peak_bytes"]


def peak(result):
    return max(result.column("peak_bytes"))


@pytest.fixture(scope="module")
def table(shared_paced):
    """A plan that splits the batch: the table for a budget in which the whole batch does not fit."""
    return shared_paced.text("plan", batch=64, memory="3MiB", json=True).ok().document


# The plan

def test_a_plan_is_over_micro_batch_and_recompute(table):
    cuts = [(each["micro_batch"], each["recompute"]) for each in table["candidates"]]
    assert {recompute for _, recompute in cuts} == {False, True} and len(set(cuts)) == len(cuts)
    assert cuts == sorted(cuts, key=lambda cut: (cut[1], cut[0]))
    assert all(each["time_measured"] in (False, True) for each in table["candidates"])


def test_recompute_takes_less_memory_than_the_same_split_without_it(paced):
    def peaks(recompute):
        plan = paced.text("plan", batch=64, layers=2, memory="3MiB", recompute=recompute, json=True).ok().document
        # Of a single sample there is as much to compute again as there was to keep.
        return {each["micro_batch"]: peak_of(each) for each in plan["candidates"] if each["micro_batch"] > 1}

    always, never = peaks("always"), peaks("never")
    both = always.keys() & never.keys()
    assert len(both) > 3 and all(always[size] < never[size] for size in both)


def test_the_chosen_is_measured_fits_and_is_as_fast_as_any_that_was_measured(table):
    chosen = chosen_of(table)
    assert chosen["measured_peak_bytes"] <= table["budget_bytes"] and chosen["time_measured"]
    times = [each["step_seconds"] for each in table["candidates"] if each["fits"] and each["time_measured"]]
    # 1.02: of two so close the planner takes the one that needs less memory.
    assert chosen["step_seconds"] <= 1.02 * min(times) * (1 + 1e-12)


def test_every_peak_is_the_sum_of_its_parts_and_the_largest_of_its_phases(table):
    for each in table["candidates"]:
        assert list(each["parts"]) == [name.replace(" ", "_") for name in PARTS]
        assert min(each["parts"].values()) >= 0
        assert sum(each["parts"].values()) == max(each["phases"].values()) == peak_of(each)


@pytest.mark.parametrize("flags, copies", [({}, 2), ({"optimizer": "sgd"}, 1),
                                           ({"optimizer": "sgd", "momentum": 0}, 0)],
                         ids=["adamw", "momentum", "sgd"])
def test_the_parts_are_those_of_the_model_and_the_optimizer(run, flags, copies):
    weights = run.text("train", **flags).ok().weights
    parameters = sum(4 * len(numbers) for _, numbers in weights.values())
    # A cut batch: its gradients are there when the next micro-batch is computed.
    parts = chosen_of(run.text("plan", micro_batch=2, json=True, **flags).ok().document)["parts"]
    slack = 64 * len(weights)  # a tensor takes whole cache lines
    assert parameters <= parts["parameters"] <= parameters + slack
    assert parameters <= parts["gradients"] <= parameters + slack
    # AdamW counts its steps in a tensor a parameter, too.
    assert copies * parameters <= parts["optimizer_state"] <= copies * (parameters + 2 * slack)


def test_a_plan_says_in_one_line_why(run, table):
    assert "the fastest that fits; the whole batch would need" in table["why"] and "\n" not in table["why"]
    whole = next(each for each in table["candidates"] if each["micro_batches"] == 1 and not each["recompute"])
    told = in_bytes(re.search(r"would need ([\d.]+ \w+)", table["why"])[1])
    assert told == pytest.approx(peak_of(whole), rel=0.01)  # three digits
    assert "no accumulation needed" not in table["why"]
    assert run.text("plan", batch=4, micro_batch=2, json=True).ok().document["why"] == "as given"


def test_a_plan_says_that_no_accumulation_is_needed(paced):
    document = paced.text("plan", batch=2, json=True).ok().document
    assert "no accumulation needed" in document["why"] and document["micro_batches"] == 1
    assert re.search(r"^chosen  in one piece: .*no accumulation needed$", paced.text("plan", batch=2).ok().stdout, re.MULTILINE)


def test_the_table_has_predicted_and_measured_and_what_they_are_made_of(run):
    result = run.text("plan", batch=64, memory="3MiB").ok()
    lines = result.stdout.splitlines()
    assert result.stderr == "" and "\x1b" not in result.stdout and "\r" not in result.stdout
    head = next(i for i, line in enumerate(lines) if "predicted peak" in line)
    assert re.split(r" {2,}", lines[head].strip()) == COLUMNS
    rows = lines[head + 1 : lines.index("", head)]
    assert len([row for row in rows if row.startswith("chosen ")]) == 1
    assert any(" s predicted " in row for row in rows) and any(re.search(r"\d s  ", row) for row in rows)

    def block(title):
        told = lines[lines.index(title) + 1 :]
        return [re.fullmatch(r"  (.+?) +([\d.]+ \w+)", line).groups() for line in told[: told.index("")]]

    parts, phases = block("predicted peak by part"), block("predicted peak by phase")
    # Parts of size 0 are omitted: a batch of text has no tensors of its own.
    assert [name for name, _ in parts] == PARTS[:-1] and 3 <= len(phases) <= 4
    # 0.03: each of up to five sizes is rounded to three digits.
    largest = max(in_bytes(size) for _, size in phases)
    assert sum(in_bytes(size) for _, size in parts) == pytest.approx(largest, rel=0.03)


def test_sizes_are_binary_or_decimal_as_they_are_written(run):
    for memory, budget in (("2GB", 2 * 10**9), ("2GiB", 2**31), ("1.5GiB", 3 * 2**29), ("700000", 700_000)):
        assert run.text("plan", memory=memory, micro_batch=1, json=True).ok().document["budget_bytes"] == budget


# Recompute

@pytest.mark.parametrize("command", ["train", "plan", "compare"])
def test_a_recompute_that_does_not_exist_is_refused(run, command):
    run.text(command, recompute="sometimes").refused(2, "--recompute sometimes", "auto", "never", "always")
    assert list(run.folder.iterdir()) == []


@pytest.mark.parametrize("command", ["train", "plan", "compare"])
def test_recompute_of_a_model_without_blocks_is_refused(run, command):
    result = run.images(command, model="mlp", norm=None, recompute="always")
    result.refused(2, "--recompute always", "mlp", "gpt", "resnet")
    assert list(run.folder.iterdir()) == []


@pytest.mark.parametrize("recompute", ["never", "always"])
def test_a_plan_uses_the_requested_recompute(run, recompute):
    document = run.text("plan", recompute=recompute, batch=64, memory="3MiB", json=True).ok().document
    assert {each["recompute"] for each in document["candidates"]} == {recompute == "always"} == {document["recompute"]}
    compared = run.text("compare", recompute=recompute, micro_batch=2, samples=16, json=True).ok().document
    assert [each["strategy"] for each in compared["strategies"]] == ["small batch", "accumulated", "native"]


@pytest.mark.parametrize("job, flags", [("text", {"dropout": 0.1}), ("images", {"norm": "group"}),
                                        ("images", {"norm": "batch"})], ids=["gpt", "group", "batch"])
def test_recompute_changes_no_bit_of_losses_weights_and_buffers(run, job, flags):
    flags |= {"layers": 2, "micro_batch": 3, "steps": 4}
    never, always = (getattr(run, job)("train", recompute=recompute, run=recompute, **flags).ok()
                     for recompute in ("never", "always"))
    assert set(never.column("recompute")) == {False} and set(always.column("recompute")) == {True}
    for name in ("loss", "gradient_norm"):
        assert never.column(name) == always.column(name)
    assert weights_file(never) == weights_file(always)
    assert peak(always) < peak(never)


# Predictions match measurements; for memory in addition to the plan, see test_noise.py

ALONE = {"noise_every": 0, "restores": 0}

@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("job, flags, recompute", [
    *[("text", {}, recompute) for recompute in ("never", "always")],
    *[("images", {"norm": norm}, recompute) for norm in ("group", "batch") for recompute in ("never", "always")],
    ("images", {"model": "mlp", "norm": None}, "never"),
])
def test_the_peak_of_a_run_is_what_was_predicted(run, job, flags, recompute, optimizer):
    # Planned by itself with a budget that cuts, and given.
    for cut in ({"batch": 32, "memory": "3MiB"}, {"batch": 8, "micro_batch": 3}):
        result = getattr(run, job)("train", optimizer=optimizer, recompute=recompute, steps=3,
                                   run=f"run{cut['batch']}", **cut | flags | ALONE).ok()
        (predicted,) = set(result.column("predicted_peak_bytes"))
        assert predicted == pytest.approx(peak(result), rel=0.03)


@pytest.mark.parametrize("job, memory", [("text", "3MiB"), ("images", "6MiB")])
def test_a_prediction_is_what_a_run_with_that_split_needs(run, paced, job, memory):
    plan = getattr(paced, job)("plan", batch=64, memory=memory, json=True).ok().document
    only = [each for each in plan["candidates"] if each["predicted_peak_bytes"] and not each["measured_peak_bytes"]]
    assert {each["recompute"] for each in only} == {False, True}
    for each in only:
        recompute = "always" if each["recompute"] else "never"
        result = getattr(run, job)("train", batch=64, micro_batch=each["micro_batch"], recompute=recompute, steps=2,
                                   no_verify=True, run=f"{each['micro_batch']}{recompute}", **ALONE).ok()
        assert each["predicted_peak_bytes"] == pytest.approx(peak(result), rel=0.03), each


# A budget in which only recompute fits

@pytest.fixture(scope="module")
def between(shared_run):
    """More than a micro-batch of 1 needs with recompute, less than it needs without."""
    least = [chosen_of(shared_run.text("plan", micro_batch=1, recompute=recompute, json=True, **DEEP).ok().document)
             for recompute in ("always", "never")]
    always, never = (each["measured_peak_bytes"] for each in least)
    assert always < 0.98 * never
    return f"{(always + never) // 2}B"


def test_recompute_is_chosen_where_nothing_else_fits_and_the_budget_is_kept(run, between):
    run.text("plan", memory=between, recompute="never", **DEEP).misfit("micro-batch of 1 sample")
    plan = run.text("plan", memory=between, json=True, **DEEP).ok().document
    assert plan["recompute"] is True and "without recompute it does not fit" in plan["why"]
    result = run.text("train", memory=between, steps=4, json=True, **DEEP).ok()
    assert result.document["recompute"] is True and set(result.column("recompute")) == {True}
    assert all(bytes_ <= int(between[:-1]) for bytes_ in result.column("peak_bytes"))
    assert set(result.column("out_of_memory")) == {0}
    compared = run.text("compare", memory=between, samples=16, json=True, **DEEP).ok().document["strategies"]
    assert [each["fits"] for each in compared] == [True, True, False]


def test_the_config_of_a_run_replays_its_plan(run, between):
    first = run.text("train", memory=between, dropout=0.1, steps=4, run="first", **DEEP).ok()
    written = tomllib.loads((first.folder / "config.toml").read_text())
    assert (written["micro-batch"], written["recompute"]) == (first.metrics[0]["micro_batch"], "always")
    plan = run("plan", "--config", "first/config.toml", "--json").ok().document
    assert (plan["micro_batch"], plan["recompute"]) == (written["micro-batch"], True)
    assert f"{plan['budget_bytes']}B" == between and plan["why"] == "as given"
    again = run("train", "--config", "first/config.toml", "--run", "run").ok()
    for name in ("loss", "micro_batch", "recompute", "peak_bytes", "predicted_peak_bytes"):
        assert first.column(name) == again.column(name)
    assert weights_file(first) == weights_file(again)


# Nothing fits

@pytest.mark.parametrize("command", ["train", "plan", "compare"])
@pytest.mark.parametrize("memory", ["1KiB", "100KiB", "300KiB"])  # below the parameters, below the state, nearly
def test_if_nothing_fits_it_says_what_the_smallest_plan_needs(run, command, memory):
    result = run.text(command, memory=memory)
    parts = result.misfit("micro-batch of 1 sample", f"budget of {memory[:-3]} KiB")
    needed, missing = (in_bytes(size) for size in re.findall(r"[\d.]+ [KM]iB", result.stderr)[:2])
    # 0.03: sizes have three digits.
    assert sum(parts.values()) == pytest.approx(needed, rel=0.03)
    assert needed - missing == pytest.approx(in_bytes(memory.replace("K", " K")), abs=0.02 * needed)
    assert parts["parameters"] > 1024 and parts["activations"] > 0
    assert command == "plan" or result.stdout == ""
    assert list(run.folder.iterdir()) == []


def test_what_would_help_depends_on_what_is_missing(run):
    assert "samples" not in run.text("plan", memory="1KiB").stderr.split("what would help")[1]
    help_ = run.text("plan", memory="400KiB").stderr.split("what would help")[1]
    assert "shorter or smaller samples" in help_ and "SGD" in help_ and "smaller model" in help_
    assert "SGD" not in run.text("plan", memory="240KiB", optimizer="sgd", momentum=0).stderr.split("would help")[1]


@pytest.mark.parametrize("width", [16, 32, 48])
def test_the_budget_that_would_help_does(run, width):
    told = run.text("plan", memory="2KiB", width=width, heads=1).stderr
    needed = re.search(r"what would help: a budget of ([\d.]+ \w+)", told)[1].replace(" ", "")
    run.text("plan", memory=needed, width=width, heads=1).ok()


def test_a_plan_in_which_nothing_fits_is_still_one_document(run):
    result = run.text("plan", memory="300KiB", json=True)
    result.misfit()
    document = result.document
    assert document["fits"] is False and document["why"] == "nothing fits"
    assert document["micro_batch"] is document["micro_batches"] is document["recompute"] is None
    assert document["candidates"] and not any(each["fits"] for each in document["candidates"])


# What was predicted against what was measured

def test_plan_of_a_run_shows_predicted_against_measured(run):
    trained = run.text("train", steps=5, micro_batch=3).ok()
    (row,) = run("plan", "--run", "run", "--json").ok().document
    assert (row["steps"], row["micro_batch"], row["recompute"], row["out_of_memory"]) == (5, 3, False, 0)
    assert row["predicted_peak_bytes"] == trained.metrics[0]["predicted_peak_bytes"]
    assert row["measured_peak_bytes"] == peak(trained)
    assert row["predicted_step_seconds"] == trained.metrics[0]["predicted_step_seconds"]
    assert row["measured_step_seconds"] == pytest.approx(sorted(trained.column("step_seconds"))[2])
    result = run("plan", "--run", "run").ok()
    head, line = result.stdout.splitlines()
    assert all(name in head for name in ("predicted peak", "measured peak", "predicted time", "measured time"))
    assert line.split()[:3] == ["5", "3", "no"] and len(re.findall(r"[+-][\d.]+ %", line)) == 2
    assert result.stderr == "" and "\x1b" not in result.stdout


@pytest.mark.parametrize("change, words", [
    (None, ["metrics.jsonl"]), (lambda text: "", ["metrics.jsonl", "no step"]),
    (lambda text: text[:-20], ["metrics.jsonl", "line 2"]), (lambda text: "{}\n" + text, ["metrics.jsonl", "line 1"]),
    (lambda text: text + "\n", ["metrics.jsonl", "line 3"]), (lambda text: "[1]\n", ["metrics.jsonl", "line 1"]),
    (lambda text: text.replace('"micro_batch":', '"micro_batch":"x",'), ["metrics.jsonl", "line 1"]),
    (lambda text: text.replace('"peak_bytes":', '"peak":'), ["metrics.jsonl", "line 1"]),
], ids=["missing", "empty", "cut off", "no keys", "empty line", "a list", "text", "a key less"])
@pytest.mark.parametrize("json", [[], ["--json"]], ids=["table", "json"])
def test_a_corrupted_run_is_bad_data(shared_run, run, change, words, json):
    if change is not None:
        whole = shared_run.folder / "whole" / "metrics.jsonl"
        if not whole.exists():
            shared_run.text("train", run="whole").ok()
        (run.folder / "run").mkdir()
        (run.folder / "run" / "metrics.jsonl").write_text(change(whole.read_text()))
    run("plan", "--run", "run", *json).refused(5, "run", *words)


def test_a_file_is_not_a_run(run, data):
    run("plan", "--run", data.text).refused(5, data.text.name)


# The summary of a run

def test_the_summary_compares_predicted_and_measured(run):
    result = run.text("train", steps=5, micro_batch=4, recompute="always").ok()
    memory, seconds = (next(line for line in result.stdout.splitlines() if line.startswith(name) and "measured" in line)
                       for name in ("memory", "time"))
    measured, predicted = (in_bytes(size) for size in re.findall(r"[\d.]+ [KM]iB", memory)[:2])
    assert measured == pytest.approx(peak(result), rel=0.01) and predicted == pytest.approx(measured, rel=0.03)
    told, guess = map(float, re.findall(r"([\d.]+) s ", seconds))
    assert told == pytest.approx(sorted(result.column("step_seconds"))[2], abs=6e-4)  # three decimals
    assert guess == pytest.approx(result.metrics[0]["predicted_step_seconds"], abs=6e-4)
    assert "with recompute" in result.stdout and math.isfinite(guess)
