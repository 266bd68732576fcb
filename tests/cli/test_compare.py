"""The three strategies side by side: the same samples, correct marks, and the same gradient from both ways to run a batch."""

import json
import os
import pathlib
import signal

import pytest

from conftest import ended
from gate import wait_until

NAMES = ["small batch", "accumulated", "native"]
COLUMNS = ["strategy", "batch", "micro-batch", "peak memory", "fits", "gradient variance", "time per step",
           "held-out loss", "sharpness"]


@pytest.fixture(scope="module")
def tight(shared_paced):
    return shared_paced.text("compare", batch=32, memory="1MiB", samples=128, json=True).ok()


@pytest.fixture(scope="module")
def strategies(tight):
    return {each["strategy"]: each for each in tight.document["strategies"]}


def test_there_are_three_strategies(strategies):
    assert list(strategies) == NAMES
    small, accumulated, native = strategies.values()
    assert accumulated["batch"] == native["batch"] == native["micro_batch"] == 32
    assert small["batch"] == small["micro_batch"] == accumulated["micro_batch"] < 32


def test_native_is_run_and_marked_if_it_exceeds_the_budget(tight, strategies):
    budget = tight.document["budget_bytes"]
    assert budget == 2**20
    assert all(each["ran"] and each["fits"] == (each["peak_bytes"] <= budget) for each in strategies.values())
    assert [strategies[name]["fits"] for name in NAMES] == [True, True, False]


def test_accumulated_and_native_have_the_same_gradient_variance(strategies):
    _, accumulated, native = strategies.values()
    assert accumulated["gradient_variance"] == pytest.approx(native["gradient_variance"], rel=1e-3)
    assert accumulated["held_out_loss"] == pytest.approx(native["held_out_loss"], rel=1e-3)


def test_the_small_batch_has_a_larger_gradient_variance_about_as_its_size_says(strategies):
    small, accumulated, _ = strategies.values()
    ratio = small["gradient_variance"] / accumulated["gradient_variance"]
    # The variance of a mean falls as one over the batch; eight batches of each measure it roughly.
    assert 0.5 < ratio / (32 / small["batch"]) < 2


def test_accumulated_needs_little_more_than_the_small_batch(strategies):
    small, accumulated, native = (each["peak_bytes"] for each in strategies.values())
    assert small <= accumulated < 1.3 * small < native


def test_times_are_positive(strategies):
    assert all(each["sample_seconds"] > 0 and each["step_seconds"] > 0 for each in strategies.values())


def test_the_table_has_a_row_for_each_and_the_columns(paced):
    lines = paced.text("compare", batch=32, memory="1MiB").ok().stdout.splitlines()
    head = next(line for line in lines if line.startswith("strategy"))
    assert [name for name in COLUMNS if name not in head] == []
    rows = lines[lines.index(head) + 1 :][:3]
    assert [next(name for name in NAMES if row.startswith(name)) for row in rows] == NAMES
    marks = [row[: head.index("fits") + 4].split()[-1] for row in rows]
    assert marks == ["yes", "yes", "no"]


def test_all_fit_when_there_is_room(run):
    document = run.text("compare", batch=8, json=True).ok().document
    assert [each["fits"] for each in document["strategies"]] == [True] * 3


def test_images_with_group_norm_agree_too(run):
    document = run.images("compare", batch=16, micro_batch=4, samples=32, json=True).ok().document
    _, accumulated, native = document["strategies"]
    assert accumulated["micro_batch"] == 4
    assert accumulated["gradient_variance"] == pytest.approx(native["gradient_variance"], rel=1e-3)
    assert accumulated["held_out_loss"] == pytest.approx(native["held_out_loss"], rel=1e-3)


def test_a_batch_of_one_compares_with_itself(run):
    variances = [each["gradient_variance"]
                 for each in run.text("compare", batch=1, samples=8, json=True).ok().document["strategies"]]
    assert variances == [variances[0]] * 3


def test_the_same_seed_compares_the_same(run):
    first, again = (run.text("compare", micro_batch=2, json=True).ok().document for _ in range(2))
    for one, other in zip(first["strategies"], again["strategies"]):
        assert one["held_out_loss"] == other["held_out_loss"]
        assert one["gradient_variance"] == other["gradient_variance"]


def test_comparing_writes_nothing(run):
    run.text("compare").ok()
    assert list(run.folder.iterdir()) == []


# More than three, more than one seed

@pytest.fixture(scope="module")
def batches(shared_run):
    return shared_run.text("compare", batches="4, 8,16", batch=None, micro_batch=2, seeds=3, samples=64, json=True, run="kept",
                           reference_batch=8).ok()


def test_any_batches_can_be_compared(batches):
    told = batches.document
    assert [each["strategy"] for each in told["strategies"]] == ["batch 4", "batch 8", "batch 16"]
    assert [(each["batch"], each["micro_batch"]) for each in told["strategies"]] == [(4, 2), (8, 2), (16, 2)]
    assert [each["peak_learning_rate"] for each in told["strategies"]] == pytest.approx([1e-3 * 2 ** (i / 2) for i in (-1, 0, 1)])
    assert told["seeds"] == 3


def test_every_seed_has_its_own_loss_and_the_mean_is_reported(batches):
    for each in batches.document["strategies"]:
        losses = each["held_out_losses"]
        assert len(set(losses)) == 3 and each["held_out_loss"] == pytest.approx(sum(losses) / 3)


def test_each_run_was_a_process_of_its_own_that_can_be_kept(batches):
    told = {each["strategy"].replace(" ", "-"): each for each in batches.document["strategies"]}
    assert {folder.name for folder in batches.folder.iterdir()} == {f"{name}-{seed}" for name in told for seed in (1, 2, 3)}
    for name, each in told.items():
        lines = [json.loads(line) for line in (batches.folder / f"{name}-1" / "metrics.jsonl").read_text().splitlines()]
        assert sum(line["batch"] for line in lines) == 64 and {line["batch"] for line in lines} == {each["batch"]}
        assert max(line["peak_bytes"] for line in lines) <= each["peak_bytes"]
        page = (batches.folder / f"{name}-1" / "report.html").read_text()
        assert '"title":"Strategies"' in page and "Sharp or flat" in page


def test_sharpness_and_the_loss_along_a_direction_are_measured(strategies, tight):
    distances = tight.document["distances"]
    assert distances[0] == -1 and distances[10] == 0 and distances[-1] == 1
    for each in strategies.values():
        assert each["sharpness"] > 0 and len(each["losses_along"]) == 21
        assert all(isinstance(loss, float) for loss in each["losses_along"]) and len(set(each["losses_along"])) > 15
    assert strategies["accumulated"]["sharpness"] == pytest.approx(strategies["native"]["sharpness"], rel=0.05)


def test_a_run_that_diverges_is_reported_as_such(run):
    document = run.text("compare", batch=8, micro_batch=4, samples=2000, optimizer="sgd", momentum=0, clip="inf", lr=1e6,
                        schedule="constant", seeds=1, json=True).ok().document
    assert any(each["diverged"] for each in document["strategies"])


def test_a_batch_that_holds_a_sample_more_than_once_says_so(run):
    few = run.folder / "few.txt"
    few.write_bytes(run.data.text.read_bytes()[:600])
    result = run.text("compare", data=few, batch=64, samples=64, micro_batch=16, seeds=1, json=True).ok()
    data = result.document["data_samples"]
    assert data < 64
    assert f"holds each of the data's {data} samples {64 / data:.1f}".removesuffix(".0") in result.stderr


def test_a_step_of_an_interval_is_one_of_the_largest_batch(run):
    document = run.text("compare", batches="2, 8", batch=None, micro_batch=8, samples=None, steps=3, warmup="1 steps", seeds=1,
                        json=True).ok().document
    assert document["samples"] == 24
    assert [each["micro_batch"] for each in document["strategies"]] == [2, 8]


@pytest.mark.parametrize("flags, words", [
    ({"batches": "4,,8", "batch": None}, ["--batches"]), ({"batches": "0", "batch": None}, ["--batches", "from 1"]),
    ({"batches": "8,4,8", "batch": None}, ["--batches", "twice"]), ({"batches": "3G", "batch": None}, ["--batches", "2^31"]),
    ({"batches": "8, 16"}, ["--batch 8 contradicts --batches", "8, 16"]),
    ({"batches": "8, 1000", "batch": None}, ["batch of 1000", "64 samples"]), ({"batch": 65}, ["batch of 65", "64 samples"]),
    ({"seeds": 2000}, ["--seeds"]), ({"seed": 2**64 - 1}, ["--seeds"]),
    ({"run": "/proc/none"}, ["--run"]), ({"seeds": 0}, ["--seeds"]),
    ({"batches": "8", "batch": None, "reference_batch": 0}, ["--reference-batch"]), ({"seeds": "many"}, ["many"]),
])
def test_what_cannot_be_compared_is_refused(run, flags, words):
    run.text("compare", **flags).refused(2, *words)


def test_an_existing_folder_is_not_written_to(run):
    (run.folder / "kept").mkdir()
    run.text("compare", run="kept").refused(2, "--run kept", "exists")


# The child

def processes_with(word):
    """Process ids whose command line has the word in it."""
    found = []
    for entry in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [int(entry.parent.name)] if word.encode() in entry.read_bytes() else []
        except OSError:
            pass  # gone meanwhile
    return found


@pytest.fixture
def comparing(run, monkeypatch):
    """A comparison whose child is at work, the child's process id, and the word that its command line has in it."""
    place = run.folder / "place"
    place.mkdir()
    monkeypatch.setenv("TMPDIR", str(place))
    process = run.start("compare", samples="30M")
    wait_until(lambda: any(file.stat().st_size for file in place.glob("**/metrics.jsonl")), process)
    (child,) = processes_with(str(place))
    yield process, child, str(place)
    process.kill()
    process.communicate()


def test_the_child_is_killed_with_its_parent(comparing):
    process, child, word = comparing
    process.kill()
    wait_until(lambda: processes_with(word) == [])


def test_a_signal_ends_both_even_if_the_child_does_not_react(comparing):
    process, child, word = comparing
    os.kill(child, signal.SIGSTOP)
    process.send_signal(signal.SIGTERM)
    ended(process)
    assert process.returncode == 130 and processes_with(word) == []
    assert os.listdir(word) == []


def test_sigterm_ends_both(comparing):
    process, child, word = comparing
    process.send_signal(signal.SIGTERM)
    ended(process)
    assert process.returncode == 130 and processes_with(word) == []
