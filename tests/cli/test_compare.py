"""The three strategies side by side: the same samples, honest marks, the same gradient from both ways of a batch."""

import pytest

NAMES = ["small batch", "accumulated", "native"]
COLUMNS = ["strategy", "batch", "micro-batch", "peak memory", "fits", "gradient variance", "time per step",
           "held-out loss"]


@pytest.fixture(scope="module")
def tight(shared_run):
    return shared_run.text("compare", batch=32, memory="1MiB", samples=128, json=True).ok()


@pytest.fixture(scope="module")
def strategies(tight):
    return {each["strategy"]: each for each in tight.document["strategies"]}


def test_there_are_three_strategies(strategies):
    assert list(strategies) == NAMES
    small, accumulated, native = strategies.values()
    assert accumulated["batch"] == native["batch"] == native["micro_batch"] == 32
    assert small["batch"] == small["micro_batch"] == accumulated["micro_batch"] < 32


def test_native_is_run_and_marked_when_it_is_over_the_budget(tight, strategies):
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


def test_the_table_has_a_row_for_each_and_the_columns(run):
    lines = run.text("compare", batch=32, memory="1MiB").ok().stdout.splitlines()
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
