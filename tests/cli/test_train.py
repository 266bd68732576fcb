"""The output of a run is correct: its numbers, its weights, its budget."""

import math

import pytest

from conftest import FILES

KEYS = {"step", "samples", "tokens", "batch", "loss", "weight", "learning_rate", "gradient_norm", "micro_batch", "micro_batches",
        "recompute", "out_of_memory", "step_seconds", "predicted_step_seconds", "update_seconds", "peak_bytes", "predicted_peak_bytes",
        "applied", "reason", "rolled_back_to", "gradient_variance", "squared_gradient", "noise_batch"}


def without_time(metrics):
    return [{key: value for key, value in line.items() if not key.endswith("_seconds")} for line in metrics]


@pytest.fixture(scope="module")
def text_run(shared_run):
    return shared_run.text("train", steps=6, run="text").ok()


@pytest.fixture(scope="module")
def image_run(shared_run):
    return shared_run.images("train", steps=4, run="images").ok()


def test_a_run_writes_its_files(text_run):
    assert text_run.files == FILES


def test_metrics_have_exactly_the_documented_keys(text_run, image_run):
    for result in (text_run, image_run):
        assert all(set(line) == KEYS for line in result.metrics)


def test_metrics_count_steps_samples_and_tokens_from_one(text_run):
    for step, line in enumerate(text_run.metrics, 1):
        assert (line["step"], line["samples"], line["tokens"]) == (step, 8 * step, 128 * step)
        assert line["weight"] == 128 and line["applied"] is True and line["reason"] == ""
        assert line["step_seconds"] > 0 and line["gradient_norm"] > 0
    assert len(text_run.metrics) == 6


def test_an_image_counts_as_one_token_and_is_the_weight(image_run):
    for step, line in enumerate(image_run.metrics, 1):
        assert line["samples"] == line["tokens"] == 8 * step and line["weight"] == 8


def test_the_first_loss_is_that_of_guessing(text_run, image_run):
    # An untrained model is near uniform: the logarithm of 256 bytes, and of 10 classes.
    assert text_run.metrics[0]["loss"] == pytest.approx(math.log(256), rel=0.05)
    assert image_run.metrics[0]["loss"] == pytest.approx(math.log(10), rel=0.25)


def test_training_lowers_the_loss(run):
    losses = run.text("train", steps=60, lr=0.01).ok().column("loss")
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_the_held_out_loss_is_of_as_many_samples_as_the_run_trained_on_but_sixteen_at_least(run):
    # At this rate the weights stay what they were: only other samples have another loss.
    def held_out(steps):
        return run.text("train", steps=steps, lr=1e-9, run=f"{steps}", json=True).ok().document["held_out_loss"]

    of_8, of_16, of_32 = (held_out(steps) for steps in (1, 2, 4))
    assert of_8 == pytest.approx(of_16, rel=1e-6)
    assert of_32 != pytest.approx(of_16, rel=1e-5)


@pytest.mark.parametrize("job", ["text", "images"])
def test_the_same_seed_gives_the_same_metrics_and_weights(run, job):
    first, again = (getattr(run, job)("train", micro_batch=3, steps=4, run=name).ok() for name in ("a", "b"))
    assert without_time(first.metrics) == without_time(again.metrics)
    assert (first.folder / "model.safetensors").read_bytes() == (again.folder / "model.safetensors").read_bytes()


def test_another_seed_gives_other_losses_and_weights(run):
    first, other = (run.text("train", seed=seed, micro_batch=8, run=str(seed)).ok() for seed in (1, 2))
    assert first.column("loss") != other.column("loss")
    assert first.weights.keys() == other.weights.keys()
    assert first.weights["token_embedding.weight"] != other.weights["token_embedding.weight"]


@pytest.mark.parametrize("job", ["text", "images"])
def test_the_loss_does_not_depend_on_the_micro_batch(run, job):
    runs = {size: getattr(run, job)("train", batch=16, micro_batch=size, steps=4, run=str(size)).ok()
            for size in (1, 3, 7, 16)}
    whole = runs.pop(16)
    for size, cut in runs.items():
        # 1e-4: rounding of fp32 sums of a different order, and four steps in which it can grow.
        assert cut.column("loss") == pytest.approx(whole.column("loss"), rel=1e-4), size
        assert cut.column("gradient_norm") == pytest.approx(whole.column("gradient_norm"), rel=1e-3), size
        assert set(cut.column("micro_batch")) == {size}
        assert set(cut.column("micro_batches")) == {math.ceil(16 / size)}


def test_a_larger_micro_batch_means_a_larger_peak(run):
    peaks = [max(run.text("train", batch=16, micro_batch=size, run=str(size)).ok().column("peak_bytes"))
             for size in (1, 3, 7, 16)]
    assert all(small < large for small, large in zip(peaks, peaks[1:])), peaks


@pytest.mark.parametrize("job, memory", [("text", "600KiB"), ("text", "2MiB"), ("images", "2MiB"), ("images", "8MiB")])
def test_the_budget_is_kept_and_the_peak_is_what_was_predicted(run, job, memory):
    # Noise and snapshots are beside the plan, see test_noise.py.
    result = getattr(run, job)("train", batch=64, memory=memory, steps=3, noise_every=0, restores=0).ok()
    budget = int(float(memory[:-3]) * {"KiB": 2**10, "MiB": 2**20}[memory[-3:]])
    peak = max(result.column("peak_bytes"))
    assert 0 < peak <= budget
    assert result.column("predicted_peak_bytes") == [pytest.approx(peak, rel=0.05)] * 3


def test_there_is_a_prediction_when_the_micro_batch_was_given_too(run):
    result = run.text("train", micro_batch=4, steps=3, noise_every=0, restores=0).ok()
    peak = max(result.column("peak_bytes"))
    assert result.column("predicted_peak_bytes") == [pytest.approx(peak, rel=0.05)] * 3


def test_the_prediction_is_for_the_run_when_that_is_smaller_than_a_batch(run):
    result = run.text("train", steps=None, samples=2).ok()
    assert result.column("predicted_peak_bytes") == [pytest.approx(result.column("peak_bytes")[0], rel=0.05)]


def test_samples_end_with_a_smaller_batch(run):
    result = run.text("train", steps=None, samples=20, micro_batch=3).ok()
    assert result.column("samples") == [8, 16, 20]
    assert result.column("weight") == [128, 128, 64]
    assert result.column("micro_batches") == [3, 3, 2]


def test_tokens_are_rounded_up_to_whole_samples(run):
    result = run.text("train", steps=None, tokens=1000).ok()
    assert result.column("samples") == [8, 16, 24, 32, 40, 48, 56, 63]
    assert result.column("tokens")[-1] == 63 * 16


def test_counts_can_be_written_short(run):
    assert run.images("train", model="mlp", norm=None, steps=None, samples="1k", batch=500).ok().column("samples") == [
        500, 1000]


def test_a_batch_larger_than_the_data_is_possible(run):
    assert run.images("train", model="mlp", norm=None, batch=700).ok().column("weight") == [700, 700]


@pytest.mark.parametrize("job", ["text", "images"])
def test_weights_are_a_whole_safetensors_file(run, job):
    result = getattr(run, job)("train").ok()
    for shape, numbers in result.weights.values():
        assert len(numbers) == math.prod(shape) and all(map(math.isfinite, numbers))


def test_weights_have_as_many_numbers_as_the_model(run):
    width, length, layers, bytes_ = 32, 16, 2, 256
    block = 12 * width**2 + 13 * width  # qkv, projection, two layers of the MLP, two norms, all with biases
    gpt = (bytes_ + length) * width + layers * block + 2 * width
    weights = run.text("train", layers=layers).ok().weights
    assert sum(len(numbers) for _, numbers in weights.values()) == gpt
    weights = run.images("train", model="mlp", norm=None, width=16, run="mlp").ok().weights
    assert sum(len(numbers) for _, numbers in weights.values()) == 784 * 16 + 16 + 16 * 10 + 10


def test_batch_norm_by_micro_batches_is_warned_about_and_group_norm_is_not(run):
    for norm, policy, warned in (("batch", "naive", True), ("batch", "deferred", True), ("group", "auto", False)):
        output = run.images("train", norm=norm, batch_norm=policy, micro_batch=4, run=norm + policy).ok().stdout
        assert "verify" in output and ("warning" in output) == ("BatchNorm" in output) == warned


def test_batch_norm_is_warned_about_where_it_is_worst(run):
    assert "warning" in run.images("train", norm="batch", batch_norm="naive", micro_batch=1).ok().stdout
    exact = run.images("train", norm="batch", batch_norm="exact", micro_batch=1, run="exact").ok().stdout
    assert "same gradients" in exact and "warning" not in exact


def test_batch_norm_is_the_default_of_a_resnet(run):
    assert "BatchNorm" in run.images("train", model=None, norm=None, micro_batch=4).ok().stdout


def test_no_verify_skips_the_check(run):
    output = run.images("train", norm="batch", micro_batch=4, no_verify=True).ok().stdout
    assert "warning" not in output and "verify" not in output


def test_dropout_is_named_as_the_reason_that_a_gradient_depends_on_the_split(run):
    assert "dropout" in run.text("train", dropout=0.5, micro_batch=4).ok().stdout


def test_all_kinds_of_data_train(run, data):
    text = run.text("train", data=data.tokens, micro_batch=4, run="nano").ok()
    llmc = run.text("train", data=data.tokens_llmc, micro_batch=4, run="llmc").ok()
    assert text.column("loss") == llmc.column("loss")
    plain = run.images("train", micro_batch=4, run="plain").ok()
    zipped = run.images("train", micro_batch=4, data=data.images_gz, run="gz").ok()
    assert plain.column("loss") == zipped.column("loss")
    folder = run.folder / "texts"
    (folder / "deep").mkdir(parents=True)
    for name in ("one.txt", "deep/two.txt"):
        (folder / name).write_bytes(data.text.read_bytes()[:5000])
    assert "9.77 KiB of text" in run.text("train", data=folder, run="folder").ok().stdout


def test_clipping_bounds_the_update_and_leaves_the_norm_unchanged(run):
    plain, clipped = (run.text("train", optimizer="sgd", micro_batch=8, clip=clip, run=f"{clip}").ok()
                      for clip in ("inf", 0.001))
    assert plain.metrics[0]["gradient_norm"] == clipped.metrics[0]["gradient_norm"] > 0.001
    assert plain.metrics[1]["loss"] < clipped.metrics[1]["loss"] or plain.weights != clipped.weights


def test_a_loss_that_is_not_finite_is_written_as_a_string_and_not_applied(run):
    result = run.text("train", lr=1e30, optimizer="sgd", clip="inf", steps=4)
    assert result.returncode == 4 and "diverged" in result.stderr  # though fewer than ten were refused
    bad = [line for line in result.metrics if not line["applied"]]
    assert bad and all(line["loss"] in ("nan", "inf") and "not finite" in line["reason"] for line in bad)


def test_a_run_that_diverges_is_stopped_and_says_so(run):
    result = run.text("train", optimizer="sgd", lr="1e30", clip="inf", steps=100, restores=0)
    assert result.returncode == 4
    assert "diverged" in result.stderr and "--lr" in result.stderr and "not finite" in result.stderr
    assert result.column("applied").count(False) == 10 and result.column("reason")[-1] == "loss is not finite"
    assert "loss nan" in result.stdout
