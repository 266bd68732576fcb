"""The examples in docstrings and in the documents run as they stand."""

import inspect
import itertools
import re
import textwrap
import types

import models
import pytest
import torch
from conftest import ROOT

import microbatch as mb

PLAIN = [mb.Accumulator, mb.AdamW, mb.ChannelRMSNorm, mb.SGD, mb.Schedule, mb.ScheduleDriver, mb.SpikeGuard, mb.Trainer, mb.advise, mb.curvature,
         mb.optimize, mb.plan, mb.replace_batch_norm, mb.scale_to_batch, mb.verify, mb.losses, mb.losses.from_mean, mb.memory, mb]


def examples(text):
    """The indented blocks of a docstring, those of one docstring as one."""
    found = [match for match in re.findall(r"(?:^(?: {4}.*)?\n)+", inspect.cleandoc(text) + "\n", re.MULTILINE) if match.strip()]
    return "\n".join(textwrap.dedent(one) for one in found)


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the examples take as given."""
    monkeypatch.chdir(tmp_path)
    model, batch, loss = models.gpt2()
    model.config._attn_implementation = "eager"  # the other has no second derivative, for curvature
    for name in ("input_ids", "labels"):  # one sentence, so that its gradient stands out from the noise, for advise
        batch[name] = torch.where(batch["attention_mask"] == 1, 5 + torch.arange(batch[name].shape[1]), batch[name])
    samples = [{name: field[i] for name, field in batch.items()} for i in range(len(batch["labels"]))]
    optimizer = torch.optim.AdamW(model.parameters())
    yield {
        "mb": mb, "torch": torch, "itertools": itertools, "model": model, "optimizer": optimizer, "my_optimizer": optimizer,
        "loss": loss, "batch": batch, "batches": [batch] * 8, "loader": [batch] * 2, "micro_batches": [batch],
        "dataset": samples, "data": samples, "validation": samples, "lengths": [len(one["labels"]) for one in samples],
        "collate": torch.utils.data.default_collate, "accumulator": mb.Accumulator(model, optimizer, loss), "folder": tmp_path,
    }
    mb.memory.set_budget(None)


@pytest.mark.parametrize("what", PLAIN, ids=lambda what: what.__name__)
def test_the_example_of_a_docstring_runs(what, names):
    code = examples(what.__doc__)
    assert code, f"{what.__name__} has no example"
    exec(compile(code, what.__name__, "exec"), names)


def test_every_public_function_and_class_that_does_something_has_an_example():
    public = [getattr(mb, name) for name in mb.__all__]
    made = [one for one in public if isinstance(one, types.FunctionType) or "__init__" in vars(one)]
    made = [one for one in made if not hasattr(one, "__dataclass_fields__") and one is not mb.Optimized]  # made by optimize()
    assert [one.__name__ for one in made if one not in PLAIN] == []


def test_the_example_of_the_trainer_for_transformers_runs(names):
    transformers = pytest.importorskip("transformers")
    from microbatch.integrations.transformers import Trainer

    exec(examples(Trainer.__doc__), names | {"transformers": transformers})


def test_the_example_of_the_strategy_for_lightning_runs(names):
    lightning = pytest.importorskip("lightning")
    from microbatch.integrations.lightning import MicrobatchStrategy

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = torch.nn.Linear(6, 3)

        def training_step(self, batch, index):
            x, y = batch
            return torch.nn.functional.cross_entropy(self.model(x), y)

        def configure_optimizers(self):
            return mb.AdamW(self.parameters())

    pairs = torch.utils.data.TensorDataset(torch.randn(16, 6), torch.arange(16) % 3)
    exec(examples(MicrobatchStrategy.__doc__), names | {"lightning": lightning, "module": Module(), "dataset": pairs})


def blocks():
    for name in ("README.md", "docs/python.md"):
        path = ROOT / name
        if not path.exists():  # an installed package is tested without the source tree
            continue
        for match in re.finditer(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
            if "pieces(batch, K)" not in match[1]:  # the loop before
                yield pytest.param(match[1], id=f"{name}, {match[1].splitlines()[0][:30]}")


@pytest.mark.parametrize("code", list(blocks()))
def test_the_python_of_a_document_runs(code, names):
    exec(code, names)
