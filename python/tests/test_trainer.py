"""A run in a folder: what it writes, how it ends, and that a resume goes on with the same bits."""

import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time

import models
import pytest
import run_to_kill
import torch
from runs import lines, pairs, trained, trainer
from torch import nn

import microbatch as mb


def test_a_run_writes_what_the_command_writes(tmp_path):
    outcome = trainer(tmp_path / "run", epochs=8, held_out=pairs(10), noise_every=1, micro_batch=4).train()
    assert (outcome.steps, outcome.samples) == (32, 512)
    assert outcome.loss < outcome.first_loss
    assert 0.0 < outcome.held_out_loss < outcome.first_loss
    assert outcome.plan == mb.Plan(4)
    assert outcome.peak_bytes <= outcome.predicted_peak_bytes * 1.01
    assert outcome.noise_batch is None or outcome.noise_batch > 0.0
    written = {one.name for one in (tmp_path / "run").iterdir()}
    assert {"metrics.jsonl", "config.toml", "checkpoints", "model.safetensors", "report.html", "summary.json"} <= written
    assert any(name.startswith("events.out.tfevents.") for name in written)
    assert [one["step"] for one in lines(tmp_path / "run")] == list(range(1, 33))
    assert "MLP" not in (tmp_path / "run" / "report.html").read_text()
    assert "run: Sequential" in (tmp_path / "run" / "report.html").read_text()
    assert 'optimizer = "AdamW"' in (tmp_path / "run" / "config.toml").read_text()


def test_the_weights_are_those_of_the_model(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    run = trainer(tmp_path / "run", steps=3)
    run.train()
    written = safetensors.load_file(tmp_path / "run" / "model.safetensors")
    own = run.model.state_dict()
    assert written.keys() == own.keys()
    assert all(torch.equal(written[name], own[name]) for name in own)


def test_an_update_is_that_of_an_accumulator(tmp_path):
    run = trainer(tmp_path / "run", steps=1, schedule="constant", clip_norm=float("inf"), lengths=[1] * 64)
    other = models.mlp()[0]
    other.load_state_dict(run.model.state_dict())
    seen = []

    def loss(model, micro):
        seen.append(micro)
        return mb.losses.image_classification(model, micro)

    run.loss = loss
    seen_before = len(seen)
    run.train()
    batch = [torch.cat(field) for field in zip(*seen[-lines(tmp_path / "run")[0]["micro_batches"] :], strict=True)]
    assert seen_before == 0
    optimizer = mb.AdamW([{"params": [one for one in other.parameters() if one.dim() >= 2], "weight_decay": 0.1},
                          {"params": [one for one in other.parameters() if one.dim() < 2], "weight_decay": 0.0}], lr=0.01)
    mb.Accumulator(other, optimizer, mb.losses.image_classification, micro_batch=16).step(tuple(batch))
    for ours, theirs in zip(run.model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def test_a_run_that_stops_and_resumes_has_the_same_bits(tmp_path):
    run_to_kill.train(tmp_path / "whole", 20)
    for _ in range(100):
        asked = 0

        def stop(step):
            nonlocal asked
            asked += 1
            if asked == 7:
                raise InterruptedError("enough")

        try:
            run = mb.Trainer(run_to_kill.build(), run_to_kill.Samples(), mb.losses.image_classification, batch=16,
                             micro_batch=5, lr=0.01, steps=20, run=tmp_path / "ended", resume=True, checkpoint_every=3,
                             progress=False, verify=False)
            outcome = run.train(on_step=stop)
        except InterruptedError:
            continue
        break
    assert outcome.resumed_from == 14
    assert trained(tmp_path / "ended") == trained(tmp_path / "whole")


def test_a_run_that_is_killed_twenty_times_has_the_same_bits(tmp_path):
    steps, kills = 600, 20
    run_to_kill.train(tmp_path / "whole", steps)
    # One interpreter that has imported torch, and forks a process for every attempt.
    driver = pathlib.Path(__file__).with_name("kill_runs.py")
    done = subprocess.run([sys.executable, driver, tmp_path / "killed", str(steps), str(kills)], capture_output=True,
                          text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert f"{kills} kills" in done.stdout
    assert trained(tmp_path / "killed") == trained(tmp_path / "whole")


def interrupted_process(folder, number):
    process = subprocess.Popen([sys.executable, run_to_kill.__file__, folder, "100000"], stderr=subprocess.PIPE, text=True)
    log = folder / "metrics.jsonl"
    while not (log.exists() and log.read_text().count("\n") > 3):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(number)
    process.wait(timeout=60)
    return process


def test_ctrl_c_leaves_a_checkpoint_in_the_middle_of_a_batch(tmp_path):
    process = interrupted_process(tmp_path / "run", signal.SIGINT)
    assert process.returncode not in (0, -signal.SIGKILL)
    assert "KeyboardInterrupt" in process.stderr.read()
    made = len(lines(tmp_path / "run"))
    newest = sorted(one.name for one in (tmp_path / "run" / "checkpoints").iterdir())[-1]
    assert int(newest.split("-")[1]) == made
    assert "Interrupted before its end." in (tmp_path / "run" / "report.html").read_text()


def test_an_exception_of_the_callback_ends_the_run_with_a_checkpoint(tmp_path):
    def fail(step):
        if step["step"] == 3:
            raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        trainer(tmp_path / "run", steps=9).train(on_step=fail)
    outcome = trainer(tmp_path / "run", steps=9, resume=True).train()
    assert outcome.resumed_from == 3
    assert outcome.steps == 9


def test_a_loss_that_raises_keeps_its_exception_and_the_steps_before(tmp_path):
    calls = 0

    def loss(model, micro):
        nonlocal calls
        calls += 1
        if calls == 30:
            raise LookupError("mine")
        return mb.losses.image_classification(model, micro)

    with pytest.raises(LookupError, match="mine"):
        trainer(tmp_path / "run", steps=9, loss=loss, micro_batch=4, verify=False).train()
    assert trainer(tmp_path / "run", steps=9, resume=True, micro_batch=4).train().resumed_from >= 1


def test_a_run_that_diverges_is_stopped_and_says_what_to_do(tmp_path):
    def loss(model, micro):
        x, y = micro
        return (model(x).square().sum() - 100 * y.sum()).pow(3), len(y)

    with pytest.raises(mb.Stopped, match="lower lr"):
        trainer(tmp_path / "run", steps=200, lr=1e4, schedule="constant", loss=loss, verify=False).train()
    assert "lower lr" in (tmp_path / "run" / "report.html").read_text()


def test_a_budget_that_nothing_fits_is_said_before_the_folder_is_made_and_does_not_stay(tmp_path):
    with pytest.raises(mb.DoesNotFit):
        trainer(tmp_path / "run", memory="1KiB").train()
    assert not (tmp_path / "run").exists()
    assert mb.memory.stats().budget_bytes is None
    trainer(tmp_path / "run", steps=1).train()
    assert mb.memory.stats().budget_bytes is None


def test_a_run_in_which_every_batch_has_weight_0_has_failed(tmp_path):
    with pytest.raises(mb.Stopped, match="every batch has weight 0"):
        trainer(tmp_path / "run", steps=2, verify=False, loss=lambda model, micro: (model(micro[0]).sum(), 0.0)).train()


def test_a_model_in_evaluation_mode_is_trained_in_training_mode(tmp_path):
    run = trainer(tmp_path / "run", steps=1)
    run.model.eval()
    run.train()
    assert run.model.training


def test_ragged_samples_are_taken_by_length(tmp_path):
    words = [torch.randint(0, 9, (1 + i % 13,)) for i in range(50)]
    shapes = []

    def collate(samples):
        return torch.nn.utils.rnn.pad_sequence(samples, batch_first=True)

    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.Embedding(9, 4, padding_idx=0), nn.Linear(4, 1)

        def forward(self, x):
            return self.head(self.words(x).sum(1))

    def loss(model, micro):
        shapes.append(micro.shape)
        return model(micro).square().sum(), len(micro)

    for bound in ("samples", "tokens"):
        mb.Trainer(Bag(), words, loss, batch=50, micro_batch=10, run=tmp_path / bound, collate_fn=collate, lengths=len,
                   bound=bound, steps=1, progress=False, verify=False, memory="1GiB").train()
        made = lines(tmp_path / bound)[0]["micro_batches"]
        widths = [width for _, width in shapes[-made:]]
        assert widths == sorted(widths, reverse=True)
        assert sum(rows for rows, _ in shapes[-made:]) == 50
        assert max(rows * width for rows, width in shapes[-made:]) <= 10 * 13
        assert made == 5 if bound == "samples" else made < 5


@pytest.mark.parametrize("ended", [False, True])
def test_workers_change_no_bit_whether_the_run_is_ended_or_not(tmp_path, ended):
    def run(folder, workers, on_step=None):
        return mb.Trainer(run_to_kill.build(), run_to_kill.Samples(), mb.losses.image_classification, batch=16,
                          micro_batch=5, lr=0.01, steps=6, run=folder, resume=True, workers=workers, progress=False,
                          verify=False).train(on_step)

    def stop(step):
        if step["step"] == 4:
            raise InterruptedError

    run(tmp_path / "one", 1)
    if ended:
        with pytest.raises(InterruptedError):
            run(tmp_path / "two", 2, stop)
    run(tmp_path / "two", 2)
    assert trained(tmp_path / "two") == trained(tmp_path / "one")
    assert not multiprocessing.active_children()


def test_out_of_memory_in_a_run_has_the_bits_of_the_smaller_plan(tmp_path):
    class Failing(nn.Sequential):
        most = 16

        def forward(self, x):
            if len(x) > self.most:
                raise torch.OutOfMemoryError("out of memory")
            return super().forward(x)

    outcomes = []
    for name in ("retried", "planned"):
        torch.manual_seed(3)
        model = Failing(*models.mlp()[0], nn.Dropout(0.1))
        run = mb.Trainer(model, pairs(), mb.losses.image_classification, batch=16, lr=0.01, steps=5, micro_batch=8,
                         run=tmp_path / name, progress=False, verify=False, memory="1GiB")

        def after(step, name=name, model=model, run=run):
            if step["step"] == 2 and name == "retried":
                model.most = 4
            elif step["step"] == 2:
                run.accumulator.plan = mb.Plan(4)

        outcomes.append(run.train(after))
    assert [one.out_of_memory for one in outcomes] == [1, 0]
    assert outcomes[0].plan == mb.Plan(4)
    assert trained(tmp_path / "retried") == trained(tmp_path / "planned")


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    trainer(tmp_path / "run", steps=2).train()
    with pytest.raises(mb.UsageError, match="resume=True"):
        trainer(tmp_path / "run", steps=2).train()


def test_an_averaged_loss_is_found_before_the_first_step(tmp_path):
    def loss(model, micro):
        x, y = micro
        return nn.functional.cross_entropy(model(x), y), len(y)

    with pytest.raises(mb.UsageError, match="verify: (.|\n)*already averaged"):
        trainer(tmp_path / "run", steps=2, loss=loss).train()


@pytest.mark.parametrize(("bad", "said"), [
    ({"batch": 0}, "batch is 0"),
    ({"batch": True}, "batch is True"),
    ({"steps": 2, "epochs": 1}, "give one of steps, epochs"),
    ({"steps": 0}, "steps is 0"),
    ({"memory": "4 gigs"}, "gigs"),
    ({"micro_batch": 0}, "micro_batch is 0"),
    ({"schedule": "square"}, "square"),
    ({"warmup": "3 laps"}, "laps"),
    ({"data": 7}, "map-style dataset"),
    ({"data": {"x": torch.zeros(4, 2), "y": torch.zeros(4)}}, "a dict with the fields x, y: give a dataset of samples"),
    ({"lengths": [1, 2]}, "lengths has 2 entries for a dataset of 64"),
    ({"workers": -1}, "workers is -1"),
    ({"keep": 0}, "keep is 0"),
    ({"checkpoint_every": "5 min"}, "min"),
    ({"noise_every": -1}, "noise_every is -1"),
    ({"seed": -1}, "seed is -1"),
    ({"lr": "1e-3"}, "lr is '1e-3'"),
    ({"run": None}, "run is None"),
    ({"run": ""}, "run is ''"),
    ({"tokens": 100}, "tokens= needs tokens_per_sample="),
    ({"decay": 3}, "decay is for the schedule 'wsd'"),
    ({"guard": mb.SpikeGuard()}, "guard is True or False"),
    ({"collate_fn": "x"}, "collate_fn is a str"),
])
def test_bad_settings_are_refused_in_one_sentence(tmp_path, bad, said):
    model, _, loss = models.mlp()
    settings = {"batch": 16, "lr": 0.01, "run": tmp_path / "run", "memory": "1GiB", "progress": False} | bad
    with pytest.raises(mb.UsageError, match=said):
        mb.Trainer(model, settings.pop("data", None) or pairs(), loss, **settings)
    assert not os.path.exists(tmp_path / "run")


def test_in_a_pipe_there_is_a_line_now_and_then(tmp_path, capsys):
    trainer(tmp_path / "run", steps=30, progress=True).train()
    said = capsys.readouterr().err.splitlines()
    assert "a batch of 16 in micro-batches of" in said[0]
    assert said[-1].startswith("step 30: loss ")
    assert len(said) < 6
