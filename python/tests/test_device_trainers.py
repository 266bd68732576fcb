"""The trainers of others, and the data of our own, on an accelerator: the fake one."""

import warnings

import accelerate
import lightning as L
import pytest
import torch
import transformers
from conftest import load_fake_device, relative_difference
from lightning.pytorch.accelerators import Accelerator
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

import microbatch as mb
import models
from microbatch.integrations.lightning import MicrobatchStrategy
from microbatch.integrations.transformers import Trainer

FAKE = load_fake_device()
SAMPLES = 12


def arguments_for(device, folder, settings):
    """Accelerate, which knows no device fake, is told that it is the one of this process."""
    arguments = transformers.TrainingArguments(str(folder), use_cpu=True, **settings)
    assert arguments.device.type == "cpu"
    accelerate.PartialState._shared_state["device"] = torch.device(device)
    arguments.__dict__["_setup_devices"] = torch.device(device)
    assert str(arguments.device) == device
    return arguments


@pytest.fixture(autouse=True)
def _accelerate_as_before():
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def hugging_face(device, folder):
    settings = {"per_device_train_batch_size": 6, "max_steps": 3, "optim": "sgd", "learning_rate": 0.1,
                "save_strategy": "no", "report_to": [], "disable_tqdm": True, "dataloader_pin_memory": False,
                "logging_steps": 1}
    batch = models.ragged(samples=SAMPLES)
    samples = [{name: one[i] for name, one in batch.items()} for i in range(SAMPLES)]
    torch.manual_seed(7)
    trainer = Trainer(models.llama()[0], arguments_for(device, folder, settings), train_dataset=samples,
                      micro_batch=2)
    trainer.train()
    return trainer


def on_host(model):
    return {name: one.detach().cpu() for name, one in model.state_dict().items()}


# Sums in another order, over 3 steps: 1e-6, as of the trainers' own tests.
def test_hugging_faces_trainer_trains_there(tmp_path):
    found, expected = (hugging_face(device, tmp_path) for device in ("fake:0", "cpu"))
    assert {one.device for one in found.model.parameters()} == {torch.device("fake:0")}
    assert relative_difference_of_states(found.model, expected.model) < 1e-6
    losses = [[one["loss"] for one in trainer.state.log_history if "loss" in one] for trainer in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 3


def relative_difference_of_states(found, expected):
    return relative_difference(on_host(found), on_host(expected))


class FakeAccelerator(Accelerator):
    def setup_device(self, device):
        assert device.type == "fake"

    def teardown(self):
        pass

    @staticmethod
    def parse_devices(devices):
        return [0]

    @staticmethod
    def get_parallel_devices(devices):
        return [torch.device("fake", one) for one in devices]

    @staticmethod
    def auto_device_count():
        return 1

    @staticmethod
    def is_available():
        return True

    @staticmethod
    def name():
        return "fake"


class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3))

    def training_step(self, some, batch_idx):
        x, y = some
        loss = functional.cross_entropy(self.layers(x), y)
        self.log("loss", loss)
        self.log("share", 0.25)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def fit(device, accelerator):
    torch.manual_seed(3)
    module, data = Module(), list(zip(torch.randn(14, 5), torch.randint(3, (14,)), strict=True))
    strategy = MicrobatchStrategy(micro_batch=3, device=device)
    trainer = L.Trainer(strategy=strategy, accelerator=accelerator, devices=1, max_epochs=2, logger=False,
                        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(module, DataLoader(data, 7))
    return module, trainer


def test_lightning_trains_there():
    found, trainer = fit("fake:0", FakeAccelerator())
    expected, on_cpu = fit("cpu", "cpu")
    assert trainer.strategy.root_device == torch.device("fake:0") and trainer.global_step == 4
    assert relative_difference_of_states(found, expected) < 1e-6
    for name in ("loss", "share"):
        assert float(trainer.callback_metrics[name]) == pytest.approx(float(on_cpu.callback_metrics[name]), rel=1e-5)


class Noisy(torch.utils.data.Dataset):
    """Samples that are made on the device, with noise of its generator."""

    def __len__(self):
        return 24

    def __getitem__(self, i):
        x = torch.randn(6, device="fake") + i
        return x, torch.tensor(i % 3, device="fake")


class NoisyStream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(Noisy()[i % 24] for i in range(1000))


@pytest.mark.parametrize("data", [Noisy, NoisyStream])
def test_data_that_draws_on_the_device_is_resumed(data, tmp_path):
    def loss(model, micro):
        x, y = micro
        return functional.cross_entropy(model(x), y, reduction="sum"), len(y)

    ends = []
    for stops in ((4,), (2, 4)):
        for steps in stops:
            torch.manual_seed(1)
            model = nn.Linear(6, 3).to("fake")
            if len(stops) == 2 and steps == 4:
                torch.randn(5, device="fake")  # what the process that resumes drew before
            trainer = mb.Trainer(model, data(), loss, batch=6, micro_batch=2, steps=4, resume=True,
                                 run=tmp_path / str(len(stops)), lr=1e-2, checkpoint_every=1)
            seen = []

            def stop(line, steps=steps, seen=seen):
                seen.append(line)
                if steps < 4 and len(seen) == steps:
                    raise KeyboardInterrupt

            try:
                trainer.train(on_step=stop)
            except KeyboardInterrupt:
                continue
        ends.append(on_host(model))
    assert all(torch.equal(one, ends[1][name]) for name, one in ends[0].items())


def test_a_run_goes_on_on_another_device(tmp_path):
    def loss(model, micro):
        x, y = micro
        return functional.cross_entropy(model(x), y, reduction="sum"), (y >= 0).sum()

    torch.manual_seed(1)
    data = list(zip(torch.randn(24, 6), torch.randint(3, (24,)), strict=True))
    ends = []
    for devices in (("cpu", "cpu"), ("cpu", "fake"), ("fake", "cpu")):
        notes = []
        for device, steps in zip(devices, (2, 4), strict=True):
            torch.manual_seed(2)
            model = nn.Linear(6, 3).to(device)
            trainer = mb.Trainer(model, data, loss, batch=6, micro_batch=2, steps=steps, resume=True, schedule=None,
                                 run=tmp_path / "-".join(devices), lr=1e-2, progress=False)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                trainer.train()
            notes += [str(one.message) for one in caught]
        ends.append(on_host(model))
        said = [one for one in notes if "device was" in one]
        assert said == ([] if devices[0] == devices[1] else [said[0]])
    # fp32 sums of six addends in other orders, over 4 steps of Adam.
    assert relative_difference(ends[1], ends[0]) < 1e-5 and relative_difference(ends[2], ends[0]) < 1e-5
