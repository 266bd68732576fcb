"""--device: the command on an accelerator, which here is the fake one of the tests, loaded beside the command."""

import os
import pathlib
import re

import pytest

from conftest import COMMAND, weights_file

FAKE = os.path.abspath(
    os.environ.get("MICROBATCH_FAKE_DEVICE", pathlib.Path(COMMAND).parent / "tests" / "libfake_device.so"))


@pytest.fixture
def with_fake(run):
    """`run` of a command that has the device fake:0."""
    run.environment = os.environ | {"LD_PRELOAD": FAKE}
    return run


def close(one, other, relative):
    assert len(one) == len(other) > 0
    return all(abs(a - b) <= relative * abs(a) for a, b in zip(one, other))


# fp32 sums over at most a few hundred addends, in other orders: 1e-5 is 84 units in the last place.
@pytest.mark.parametrize("job", ["text", "images"])
def test_a_run_on_a_device_is_the_run_on_the_cpu(with_fake, job):
    train = getattr(with_fake, job)
    # SGD, because Adam magnifies the rounding of gradients that are nearly zero.
    flags = {"steps": 4, "micro_batch": 3, "optimizer": "sgd"}
    on_cpu = train("train", run="cpu", **flags).ok()
    on_device = train("train", run="device", device="fake:0", **flags).ok()
    assert close(on_cpu.column("loss"), on_device.column("loss"), 1e-5)
    assert close(on_cpu.column("gradient_norm"), on_device.column("gradient_norm"), 1e-4)
    assert re.search(r"^run .*, on fake:0$", on_device.stdout, re.MULTILINE)
    assert re.search(r"^run .*threads$", on_cpu.stdout, re.MULTILINE)
    assert 'device = "fake:0"' in (on_device.folder / "config.toml").read_text()


def test_every_model_trains_there(with_fake):
    for model, flags in {"llama-1m": {"kv_heads": 1, "inner": 32}, "gpt-tiny": {"norm": "rms", "recompute": "always"}}.items():
        with_fake.text("train", run=model, model=model, device="fake:0", **flags).ok()
    with_fake.images("train", run="mlp", model="mlp", norm=None, device="fake:0").ok()


def test_exact_batch_norm_trains_there(with_fake):
    flags = {"norm": "batch", "batch_norm": "exact", "micro_batch": 2, "steps": 3}
    on_cpu = with_fake.images("train", run="cpu", **flags).ok()
    on_device = with_fake.images("train", run="device", device="fake:0", **flags).ok()
    assert close(on_cpu.column("loss"), on_device.column("loss"), 1e-5)


def test_the_peak_of_the_device_is_predicted(with_fake):
    result = with_fake.text("train", steps=3, batch=16, micro_batch=4, noise_every=0, json=True, device="fake:0").ok()
    told = result.document
    assert told["device"] == "fake:0"
    assert told["peak_bytes"] > 0
    assert abs(told["predicted_peak_bytes"] - told["peak_bytes"]) <= 0.01 * told["peak_bytes"]


def test_a_resumed_run_has_the_bits_of_the_undisturbed_one(with_fake):
    flags = {"micro_batch": 3, "device": "fake:0"}
    whole = with_fake.text("train", run="whole", steps=6, **flags).ok()
    with_fake.text("train", run="parts", steps=3, schedule="constant", **flags).ok()
    constant = with_fake.text("train", run="constant", steps=6, schedule="constant", **flags).ok()
    parts = with_fake.in_folder("parts", ["train", "--run", "parts", "--resume", "--steps", 6]).ok()
    assert weights_file(parts) == weights_file(constant) != weights_file(whole)


def test_another_device_at_resume_is_said_and_trains_on(with_fake):
    with_fake.text("train", steps=2, device="fake:0").ok()
    result = with_fake("train", "--run", "run", "--resume", "--steps", 4, "--device", "cpu").ok()
    assert "device was fake:0, is cpu" in result.stdout
    assert with_fake.folder.joinpath("run", "metrics.jsonl").read_text().count("\n") == 4


@pytest.mark.parametrize("command", ["plan", "advise", "compare"])
def test_every_command_measures_there(with_fake, command):
    with_fake.text(command, device="fake:0", micro_batch=2).ok()


def test_a_budget_too_small_is_explained(with_fake):
    with_fake.text("plan", device="fake:0", memory="64KiB").misfit()


def test_a_budget_beyond_the_device_is_refused(with_fake):
    with_fake.text("train", device="fake:0", memory="3GiB").refused(2, "--memory", "fake:0", "1 GiB")


@pytest.mark.parametrize("device, says", [("fake:7", "fake:0"), ("cuda:31", "cpu"), ("gpu", "write cpu"),
                                          ("cpu:x", "write cpu")])
def test_a_device_that_does_not_exist_is_refused(with_fake, device, says):
    with_fake.text("train", device=device).refused(2, "--device", says)


def test_doctor_examines_it(with_fake):
    told = with_fake("doctor", "--json").ok().document
    assert told["fake:0"]["good"] and "free" in told["fake:0"]["value"]
    assert told["the same on fake:0"] == {"value": "same as those of the whole batch", "good": True}
