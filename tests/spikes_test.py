"""Deliberate spikes on small models: the guarded run ends like the clean one, the unguarded one does not."""

import json
import math
import os
import pathlib
import subprocess

import pytest

CASE = pathlib.Path(os.environ["MICROBATCH"]).with_name("spike_case")
STEPS = 600
SPIKE = STEPS // 5 * 2 + 1  # the step that it is in


def run(model, spike, guarded):
    # One thread: the models are small, and the machine is shared.
    done = subprocess.run([CASE, model, spike, guarded, str(STEPS), "1"], capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module", params=["gpt-mini", "resnet-mini"])
def clean(request):
    """A run without a spike, and the model."""
    return request.param, run(request.param, "none", "unguarded")["held_out_loss"]


def test_a_quiet_run_is_not_changed(clean):
    model, loss = clean
    found = run(model, "none", "guarded")
    assert found["refused"] == [] and found["held_out_loss"] == loss


@pytest.mark.parametrize("spike", ["poison", "rate", "nan", "sample"])
def test_a_guarded_run_ends_like_a_clean_one_and_an_unguarded_one_does_not(clean, spike):
    model, loss = clean
    guarded = run(model, spike, "guarded")
    # More than the bar of 2 %: the steps that are lost are a larger part of so short a run.
    assert guarded["held_out_loss"] <= 1.05 * loss
    assert guarded["steps"] == STEPS and guarded["refused"] and all(event["reason"] for event in guarded["refused"])
    assert guarded["refused"][0]["step"] == SPIKE + (spike == "rate")
    unguarded = float(run(model, spike, "unguarded")["held_out_loss"])
    assert math.isnan(unguarded) or unguarded > 1.05 * loss
