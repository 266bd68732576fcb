"""The learning rate is scaled with the batch by the requested rule, and the command reports the result."""

import pytest


def rates(result):
    return result.ok().column("learning_rate")


def test_the_rate_is_scaled_by_the_rule(run):
    for rule, factor in [("linear", 4), ("sqrt", 2), ("adam-sde", 2), ("beta2-time", 1), ("none", 1)]:
        result = run.text("train", batch=8, reference_batch=2, lr=0.003, lr_rule=rule, schedule="constant", run=rule)
        assert rates(result) == pytest.approx([0.003 * factor] * 2)
        assert (f"rate 0.003 at batch 2 is {0.003 * factor:g} at 8 ({rule})" in result.stdout) is (rule != "none")


def test_without_a_rule_the_optimizers_default_applies(run):
    assert rates(run.text("train", reference_batch=2, lr=0.01, schedule="constant", run="a"))[0] == pytest.approx(0.02)
    sgd = run.text("train", reference_batch=2, lr=0.01, schedule="constant", optimizer="sgd", run="b")
    assert rates(sgd)[0] == pytest.approx(0.04)


def test_without_a_reference_batch_the_rate_is_not_scaled(run):
    result = run.text("train", lr=0.01, schedule="constant")
    assert rates(result)[0] == pytest.approx(0.01)
    assert "rule" not in result.stdout


def test_the_final_rate_is_scaled_too(run):
    result = run.text("train", steps=5, reference_batch=2, lr=0.01, final_lr=0.001, schedule="linear", lr_rule="linear")
    # The last step begins at four fifths of the way.
    assert rates(result)[-1] == pytest.approx(4 * (0.01 - 0.8 * 0.009))


def test_adams_constants_change_what_is_learned(run):
    def weights(number, **flags):
        return run.text("train", steps=4, lr=0.01, schedule="constant", micro_batch=8, run=f"w{number}", **flags).ok().weights

    plain = weights(0)
    # The same rate by each rule: what differs is beta1, beta2 and epsilon.
    assert weights(1, reference_batch=2, lr_rule="beta2-time") != plain
    assert weights(2, reference_batch=8, lr_rule="beta2-time") == plain
    assert weights(3, reference_batch=8, lr_rule="linear") == plain


def test_the_configuration_that_is_written_gives_the_same_run(run):
    first = run.text("train", reference_batch=2, lr=0.003, lr_rule="adam-sde", final_lr=0.001, run="first").ok()
    again = run("train", "--config", first.folder / "config.toml", "--run", "again").ok()
    folder = first.folder.parent / "again"
    assert (folder / "model.safetensors").read_bytes() == (first.folder / "model.safetensors").read_bytes()
    assert "(adam-sde)" in again.stdout


def test_json_says_rule_and_rate(run):
    document = run.text("train", reference_batch=2, lr=0.003, json=True).ok().document
    assert document["lr_rule"] == "sqrt" and document["peak_learning_rate"] == pytest.approx(0.006)
    assert run.text("train", lr=0.003, json=True, run="other").ok().document["lr_rule"] == "none"


def test_every_compared_strategy_has_the_rate_of_its_batch(run):
    plain = run.text("compare", micro_batch=2, samples=32, json=True).ok().document["strategies"]
    scaled = run.text("compare", micro_batch=2, samples=32, json=True, reference_batch=2, lr_rule="linear")
    strategies = scaled.ok().document["strategies"]
    assert [s["peak_learning_rate"] for s in strategies] == pytest.approx([0.001, 0.004, 0.004])
    assert {s["peak_learning_rate"] for s in plain} == {0.001}
    assert strategies[0]["held_out_loss"] == plain[0]["held_out_loss"]  # its batch is the reference
    assert strategies[1]["held_out_loss"] != plain[1]["held_out_loss"]


@pytest.mark.parametrize("flags, words", [
    ({"reference_batch": 0}, ["--reference-batch", "at least 1"]),
    ({"reference_batch": "some"}, ["--reference-batch"]),
    ({"lr_rule": "sqrt"}, ["--lr-rule sqrt", "--reference-batch"]),
    ({"lr_rule": "cubic", "reference_batch": 2}, ["--lr-rule", "cubic", "linear"]),
    ({"lr_rule": "adam-sde", "reference_batch": 1, "batch": 16}, ["--lr-rule", "adam-sde has no beta1"]),
    ({"lr_rule": "beta2-time", "reference_batch": 2, "optimizer": "sgd"}, ["--lr-rule", "Adam's constants"]),
])
def test_an_undefined_rule_is_refused_before_anything_is_written(run, flags, words):
    result = run.text("train", **flags)
    result.refused(2, *words)
    assert not result.folder.exists()
