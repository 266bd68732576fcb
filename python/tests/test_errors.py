"""What is wrong is said in one clear sentence, before anything is changed."""

import copy
import os
import pathlib
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import microbatch as mb


def made(**how):
    model = nn.Linear(2, 3)
    return mb.Accumulator(model, mb.SGD(model.parameters(), lr=0.1), mb.losses.image_classification, **({"micro_batch": 2} | how))


BATCH = (torch.zeros(4, 2), torch.tensor([0, 1, 2, 0]))


@pytest.mark.parametrize(("how", "words"), [
    ({"micro_batch": 0}, "micro_batch is 0; it is a number of samples, at least 1, or 'auto'"),
    ({"micro_batch": "big"}, "micro_batch is 'big'"),
    ({"micro_batch": True}, "micro_batch is True"),
    ({"memory": "4 gigs"}, "4 gigs"),
    ({"memory": -1}, "-1"),
    ({"memory": "1.5"}, "a fraction needs a unit"),
    ({"memory": 2.5}, "a size is a number of bytes or text such as '4GiB', not 2.5"),
    ({"clip_norm": 0.0}, "clip_norm is 0; it must be above 0"),
    ({"recompute": "sometimes"}, "recompute is 'sometimes'"),
    ({"recompute": "always"}, "no list of blocks"),
    ({"recompute": nn.LSTM}, "the model has no such module"),
    ({"guard": 6.0}, r"guard is a float; give an mb.SpikeGuard\(\)"),
    ({"noise_every": -1}, "noise_every is -1"),
])
def test_a_setting_out_of_range_is_refused(how, words):
    with pytest.raises(mb.UsageError, match=words):
        made(**how)
    assert mb.memory.stats().budget_bytes is None


@pytest.mark.parametrize(("loss", "words"), [
    (lambda model, micro: model(micro[0]).sum(), "returned one Tensor; return a pair"),
    (lambda model, micro: (model(micro[0]).sum(), 1, 2), "returned 3 values; return a pair"),
    (lambda model, micro: (1.0, 4), "returned a float as the sum"),
    (lambda model, micro: (model(micro[0]).sum(), "four"), "returned a str as the weight"),
    (lambda model, micro: (model(micro[0]).sum(), torch.ones(4)), r"returned a tensor of shape \[4\] as the weight"),
])
def test_a_loss_that_returns_something_else_is_refused(loss, words):
    with pytest.raises(TypeError, match=words):
        made().step(BATCH, loss)


@pytest.mark.parametrize(("loss", "words"), [
    (lambda model, micro: (model(micro[0]).sum(1), 4), "a tensor of shape"),
    (lambda model, micro: (model(micro[0]).sum().detach(), 4), "depends on no parameter"),
    (lambda model, micro: (model(micro[0]).sum(), -1.0), "weight -1"),
    (lambda model, micro: (model(micro[0]).sum(), float("nan")), "weight nan"),
])
def test_a_loss_that_cannot_be_differentiated_or_weighed_is_refused(loss, words):
    with pytest.raises(mb.UsageError, match=words):
        made().step(BATCH, loss)


def test_a_loss_that_calls_backward_itself_is_refused():
    def own(model, micro):
        total = model(micro[0]).sum()
        total.backward(retain_graph=True)
        return total, len(micro[0])

    accumulator = made()
    with pytest.raises(mb.UsageError, match="must neither call backward"):
        accumulator.step(BATCH, own)
    assert accumulator.step(BATCH).applied


def test_gradients_that_somebody_left_are_refused_by_name():
    accumulator = made()
    accumulator.model(BATCH[0] + 1).sum().backward()
    with pytest.raises(mb.UsageError, match="parameter weight has a gradient"):
        accumulator.step(BATCH)


def test_an_optimizer_of_other_parameters_is_refused():
    with pytest.raises(mb.UsageError, match=r"updates a parameter of shape \[1, 5\] .* after the model is changed"):
        mb.Accumulator(nn.Linear(2, 3), mb.SGD(nn.Linear(5, 1).parameters()), mb.losses.image_classification)


def test_a_model_that_is_changed_afterwards_is_refused_by_name():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))
    accumulator = mb.Accumulator(model, mb.SGD(model.parameters()), mb.losses.image_classification, micro_batch=2)
    model[1] = nn.Linear(2, 3)
    with pytest.raises(mb.UsageError, match="'1.weight', which it did not have"):
        accumulator.step(BATCH)


def test_a_plan_that_does_not_fit_leaves_the_budget_as_it_was():
    accumulator = made()
    with pytest.raises(mb.DoesNotFit):
        mb.plan(accumulator, BATCH, memory="64B")
    assert mb.memory.stats().budget_bytes is None


@pytest.mark.parametrize(("model", "optimizer", "words"), [
    (lambda x: x, None, "the model is a function, not a torch.nn.Module"),
    (nn.Linear(2, 3), torch.optim.LBFGS(nn.Linear(2, 3).parameters()), "LBFGS evaluates the loss several times in a step"),
    (nn.Linear(2, 3), "adamw", r"the optimizer is a str; it needs step\(\) and param_groups"),
])
def test_what_is_no_model_or_optimizer_is_refused(model, optimizer, words):
    with pytest.raises(mb.UsageError, match=words):
        mb.Accumulator(model, optimizer, mb.losses.image_classification)


def test_a_batch_on_another_device_than_the_model_is_refused():
    batch = (torch.zeros(4, 2, device="meta"), torch.zeros(4, device="meta"))
    with pytest.raises(mb.UsageError, match="the model is on cpu, and the batch on meta"):
        made().step(batch)


def test_without_a_loss_or_an_optimizer_it_says_what_is_missing():
    model = nn.Linear(2, 3)
    with pytest.raises(mb.UsageError, match="there is no loss function"):
        mb.Accumulator(model, mb.SGD(model.parameters()), micro_batch=2).step(BATCH)
    with pytest.raises(mb.UsageError, match="has no optimizer: call gather"):
        mb.Accumulator(model, None, mb.losses.image_classification, micro_batch=2).step(BATCH)


def test_calls_out_of_turn_are_refused():
    accumulator = made()
    for call in (accumulator.apply, accumulator.finish):
        with pytest.raises(mb.UsageError):
            call()
    accumulator.gather(BATCH)
    with pytest.raises(mb.UsageError, match="neither applied nor discarded"):
        accumulator.step(BATCH)
    assert not accumulator.discard().applied
    assert accumulator.step(BATCH).applied


@pytest.mark.parametrize("copied", [pickle.dumps, copy.deepcopy, copy.copy])
def test_a_copy_is_refused(copied):
    with pytest.raises(TypeError, match="save its state_dict"):
        copied(made())


def test_another_torch_is_said_at_import():
    code = "import torch; torch.__version__ = '2.12.1'; import microbatch"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "this build of microbatch needs torch 2.13, and torch 2.12.1 is installed" in done.stderr


@pytest.mark.parametrize(("found", "said"), [
    ("raise ModuleNotFoundError(name='torch')", "microbatch needs torch 2.13: pip install torch==2.13.0"),
    ("raise ImportError('libtorch_cpu.so: file too short')", "ImportError: libtorch_cpu.so: file too short"),
])
def test_a_torch_that_is_missing_or_broken_is_told_apart(tmp_path, found, said):
    (tmp_path / "torch.py").write_text(found)
    package = pathlib.Path(mb.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", "import microbatch"], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{package}"})
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].endswith(said)


@pytest.mark.parametrize(("loss", "words"), [
    (mb.losses.causal_lm, r"needs a mapping with the tensor 'labels'; the micro-batch is a tuple"),
    (mb.losses.masked_lm, "'labels'"),
])
def test_a_ready_made_loss_says_which_field_it_needs(loss, words):
    with pytest.raises(mb.UsageError, match=words):
        made().step(BATCH, loss)
