"""What a resumed run compares with how it was started, and what it makes of a difference."""

import random
import re

import models
import pytest
import torch
from runs import lines, pairs, trainer

import microbatch as mb


@pytest.mark.parametrize(("changed", "said"), [
    ({"batch": 8}, "batch was 16, is 8"),
    ({"seed": 2}, "seed was 1, is 2"),
    ({"data": pairs(32)}, "data-samples was 64, is 32"),
    ({"optimizer": "sgd"}, "optimizer was AdamW, is SGD"),
])
def test_another_run_is_not_resumed(tmp_path, changed, said):
    trainer(tmp_path / "run", steps=2).train()
    model, _, loss = models.mlp()
    settings = {"batch": 16, "lr": 0.01, "run": tmp_path / "run", "memory": "1GiB", "progress": False, "steps": 4}
    if "optimizer" in changed:
        changed = {"optimizer": mb.SGD(model.parameters())}
    run = mb.Trainer(model, changed.get("data") or pairs(), loss, resume=True, **(settings | {k: v for k, v in changed.items() if k != "data"}))
    with pytest.raises(mb.UsageError, match=said):
        run.train()


def test_a_new_rate_is_taken_over_and_said(tmp_path, capsys):
    trainer(tmp_path / "run", steps=2).train()
    trainer(tmp_path / "run", steps=4, lr=0.005, resume=True, progress=True).train()
    said = capsys.readouterr().err
    assert "lr was 0.01, is 0.005" in said
    assert "resumes at step 2" in said


def test_other_samples_or_another_loss_are_said_when_a_run_is_resumed(tmp_path, capsys):
    def other(model, micro):
        return mb.losses.image_classification(model, micro)

    data = pairs()
    trainer(tmp_path / "run", steps=2, data=data).train()
    trainer(tmp_path / "run", steps=3, data=list(data), resume=True, progress=True).train()
    assert "samples of the data" not in capsys.readouterr().err
    data[-1] = (data[-1][0] + 1.0, data[-1][1])
    trainer(tmp_path / "run", steps=4, data=data, loss=other, resume=True, progress=True).train()
    said = capsys.readouterr().err
    assert "the samples of the data are not those with which the run was started" in said
    assert re.search("loss was image_classification, is .*other", said)


def test_samples_that_are_random_are_not_taken_for_others(tmp_path, capsys):
    class Noisy(torch.utils.data.Dataset):
        def __len__(self):
            return 32

        def __getitem__(self, index):
            return torch.randn(6), random.randrange(3)

    trainer(tmp_path / "run", steps=2, data=Noisy()).train()
    trainer(tmp_path / "run", steps=3, data=Noisy(), resume=True, progress=True).train()
    assert "samples of the data" not in capsys.readouterr().err


def test_a_run_that_diverged_goes_on_at_a_lower_rate(tmp_path, capsys):
    def run(lr, steps, **how):
        model = models.mlp()[0]
        return trainer(tmp_path / "run", lr=lr, steps=steps, batch=8, schedule="constant", optimizer=None, restores=1,
                       clip_norm=None, checkpoint_every=5, loss=squared, data=numbers, resume=True, **how)

    def squared(model, micro):
        x, y = micro
        return (model(x) - y[:, None]).square().sum(), len(y)

    x = torch.randn(64, 6)
    numbers = list(zip(x, x.sum(1), strict=True))
    run(0.001, 120).train()
    with pytest.raises(mb.Stopped, match="resume from the healthy checkpoint of step"):
        run(3e3, 600).train()
    outcome = run(0.001, 900, progress=True).train()
    assert outcome.loss < 2.0 * outcome.first_loss
    assert lines(tmp_path / "run")[-1]["learning_rate"] == 0.001
