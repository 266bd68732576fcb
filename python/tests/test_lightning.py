"""Lightning's Trainer: an unmodified LightningModule, with the update of the whole batch."""

import gc
import logging
import warnings

import lightning as L
import pytest
import torch
import torchmetrics
from conftest import relative_difference
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

import microbatch as mb
from microbatch import _core
from microbatch.integrations.lightning import STATE, MicrobatchStrategy

SAMPLES, BATCH, PADDING = 19, 8, -100  # an epoch is two whole batches and one of 3
warnings.filterwarnings("ignore", module="lightning.*")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def texts(samples=SAMPLES):
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 12, (samples,), generator=generator).tolist()
    return [torch.randint(0, 20, (length,), generator=generator) for length in lengths]


def collate(some):
    return nn.utils.rnn.pad_sequence(some, batch_first=True, padding_value=PADDING)


def count_targets(some):
    return (some[:, 1:] != PADDING).sum()


def loader(batch_size=BATCH, **how):
    return DataLoader(texts(), **({"batch_size": batch_size, "collate_fn": collate} | how))


class Module(L.LightningModule):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.embedding, self.mixing = nn.Embedding(20, 12), nn.GRU(12, 12, batch_first=True)
        self.dropout, self.head = nn.Dropout(dropout), nn.Linear(12, 20)
        self.right = torchmetrics.Accuracy("multiclass", num_classes=20, ignore_index=PADDING)

    def logits(self, some):
        return self.head(self.dropout(self.mixing(self.embedding(some[:, :-1].clamp(min=0)))[0]))

    def mean_loss(self, some):
        return functional.cross_entropy(self.logits(some).transpose(1, 2), some[:, 1:], ignore_index=PADDING)

    def training_step(self, some, batch_idx):
        loss = self.mean_loss(some)
        self.right(self.logits(some).transpose(1, 2), some[:, 1:])
        self.log("loss", loss, on_step=True, on_epoch=True, batch_size=int(count_targets(some)))
        self.log_dict({"tokens": count_targets(some).float()}, reduce_fx="sum", on_step=True, on_epoch=True)
        self.log("longest", float(some.shape[1]), reduce_fx=max, on_step=True, on_epoch=True)
        self.log("right", self.right, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, some, batch_idx):
        self.log("unseen", self.mean_loss(some), batch_size=int(count_targets(some)))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5), "interval": "step"}]


class Log(L.Callback):
    """What is logged after each batch, and which hooks were called."""

    def __init__(self):
        self.steps, self.events, self.losses, self.gradients, self.reports = [], [], [], [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        names = ("loss_step", "tokens_step", "longest_step", "right_step")
        self.steps.append([float(trainer.callback_metrics[name]) for name in names])
        self.losses.append(float(outputs["loss"]))
        self.reports.append(getattr(trainer.strategy, "last_report", None))

    def on_before_backward(self, trainer, module, loss):
        self.events.append(("before backward", trainer.global_step))
        self.losses.append(float(loss.detach()))

    def on_after_backward(self, trainer, module):
        self.events.append(("after backward", trainer.global_step))
        self.gradients += [float(one.grad.norm()) for one in module.parameters()]

    def on_before_zero_grad(self, trainer, module, optimizer):
        self.events.append(("before zero_grad", trainer.global_step))

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.events.append(("before step", trainer.global_step))

    def on_validation_end(self, trainer, module):
        self.events.append(("validated", trainer.global_step))


def fit(strategy="auto", module=None, data=None, checkpoint=None, **how):
    torch.manual_seed(7)
    module = (module or Module)()
    settings = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
                "enable_model_summary": False, "accelerator": "cpu", "log_every_n_steps": 1}
    trainer = L.Trainer(strategy=strategy, **(settings | how))
    trainer.fit(module, loader() if data is None else data, loader(), ckpt_path=checkpoint)
    return trainer


def strategy(**how):
    return MicrobatchStrategy(**({"weight": count_targets, "micro_batch": 3} | how))


def parameters(trainer):
    return {name: one.detach().clone() for name, one in trainer.lightning_module.named_parameters()}


@pytest.mark.parametrize("how", [{}, {"gradient_clip_val": 0.2},
                                 {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}])
def test_parameters_logs_and_hooks_are_those_of_the_whole_batch_at_once(how):
    runs, logs = [], []
    for kind in ("auto", strategy()):
        log = Log()
        runs.append(fit(kind, callbacks=[log], **how))
        logs.append(log)
    # Sums of a few hundred terms in another order, over 6 steps.
    assert relative_difference(parameters(runs[1]), parameters(runs[0])) < 1e-6
    assert runs[1].global_step == runs[0].global_step == 6
    assert logs[1].events == logs[0].events
    assert logs[1].gradients == pytest.approx(logs[0].gradients, rel=1e-4)  # small ones, of numbers that cancel
    assert logs[1].losses == pytest.approx(logs[0].losses, rel=1e-5)
    for ours, theirs in zip(logs[1].steps, logs[0].steps, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    for name in ("loss_epoch", "tokens_epoch", "longest_epoch", "right_epoch", "unseen"):
        assert float(runs[1].callback_metrics[name]) == pytest.approx(float(runs[0].callback_metrics[name]), rel=1e-5)


def test_lightnings_own_accumulation_is_far_off():
    expected = fit()
    accumulated = fit(data=loader(2), accumulate_grad_batches=4)
    assert relative_difference(parameters(accumulated), parameters(expected)) > 1e-3


def test_with_a_plan_of_its_own_it_is_the_same_run_and_the_trials_leave_no_trace():
    runs = [fit(kind, max_epochs=1) for kind in ("auto", strategy(micro_batch="auto", memory="256MiB"))]
    assert runs[1].strategy.accumulator.last_plan is not None
    assert relative_difference(parameters(runs[1]), parameters(runs[0])) < 1e-6
    assert float(runs[1].callback_metrics["right_epoch"]) == float(runs[0].callback_metrics["right_epoch"])


@pytest.mark.parametrize("how", [{"trim_padding": "mask"}, {"collate": collate}])
def test_padding_that_a_micro_batch_does_not_need_is_left_out(how):
    widths, expected = [], fit(max_epochs=1)

    class Masked(Module):
        def training_step(self, batch, batch_idx):
            some = batch["texts"] if isinstance(batch, dict) else batch
            widths.append(some.shape[1])
            return self.mean_loss(some)

    def masked(some):
        padded = collate(some)
        return {"texts": padded, "mask": (padded != PADDING).long()}

    def count(micro):
        return count_targets(micro["texts"] if isinstance(micro, dict) else micro)

    data = loader(collate_fn=masked if "trim_padding" in how else list)
    found = fit(strategy(weight=count, micro_batch=2, **how), Masked, data, max_epochs=1, limit_val_batches=0)
    assert relative_difference(parameters(found), parameters(expected)) < 1e-6
    assert min(widths) < max(len(one) for one in texts())


def test_a_resumed_run_has_the_bits_of_one_that_went_through(tmp_path):
    def saving():
        return ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)

    whole = fit(strategy(micro_batch="auto"), callbacks=[saving()], enable_checkpointing=True, max_epochs=3)
    checkpoint = tmp_path / "epoch=0.ckpt"
    assert STATE in torch.load(checkpoint, weights_only=False)
    resumed = fit(strategy(micro_batch="auto"), checkpoint=checkpoint, max_epochs=3)
    assert resumed.strategy.accumulator.last_plan is None
    expected = parameters(whole)
    assert all(torch.equal(one, expected[name]) for name, one in parameters(resumed).items())


def test_out_of_memory_in_the_middle_of_a_run_ends_in_the_same_update_and_the_same_logs():
    class Fail(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if trainer.global_step == 1:
                _core.fail_allocation(60)

        def on_before_backward(self, trainer, module, loss):
            _core.fail_allocation(0)

    expected, log = fit(), Log()
    found = fit(strategy(micro_batch=8), callbacks=[Fail(), log])
    assert [(one.out_of_memory, one.plan.micro_batch) for one in log.reports[:2]] == [(0, 8), (1, 4)]
    assert relative_difference(parameters(found), parameters(expected)) < 1e-6
    for name in ("loss_epoch", "tokens_epoch", "right_epoch"):
        assert float(found.callback_metrics[name]) == pytest.approx(float(expected.callback_metrics[name]), rel=1e-5)


def test_a_budget_is_kept_from_the_first_step_on_with_the_optimizers_state():
    class Wide(L.LightningModule):
        def __init__(self):
            super().__init__()
            widths = [nn.Linear(128, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 1)]
            self.layers = nn.Sequential(*widths)

        def training_step(self, batch, batch_idx):
            return self.layers(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters())

    data = DataLoader(torch.randn(4096, 128), 2048)
    mb.memory.install()
    gc.collect()
    # What there is, the weights, a gradient, the two moments of Adam, and activations.
    weights = sum(one.nbytes for one in Wide().parameters())
    budget = mb.memory.stats().live_bytes + 4 * weights + (7 << 20)
    trainer = fit(MicrobatchStrategy(memory=budget), Wide, data, limit_val_batches=0)
    report = trainer.strategy.last_report
    assert report.micro_batches > 1
    assert report.peak_bytes <= mb.memory.stats().budget_bytes
    with pytest.raises(mb.DoesNotFit):
        fit(MicrobatchStrategy(memory=mb.memory.stats().live_bytes + (1 << 18)), Wide, data, limit_val_batches=0)


def test_bf16_is_as_close_as_bf16_is():
    class Cast(Module):
        def training_step(self, some, batch_idx):
            assert torch.is_autocast_enabled("cpu")
            return self.mean_loss(some)

    runs = [fit(kind, Cast, precision="bf16-mixed") for kind in ("auto", strategy())]
    # 8 bits of mantissa: 4e-3 for a product, averaged over many.
    assert relative_difference(parameters(runs[1]), parameters(runs[0])) < 4e-3


def test_a_loss_that_draws_numbers_and_a_module_with_dropout_train():
    training = []

    class Noisy(Module):
        def training_step(self, some, batch_idx):
            training.append(self.dropout.training)
            return self.mean_loss(some) * (1.0 + 0.1 * torch.rand(()))

    trainer = fit(strategy(), lambda: Noisy(dropout=0.2))
    assert trainer.global_step == 6
    assert training[:10] == [False] * 10  # the check of the weight: two times 8 samples together, and each alone
    assert all(training[10:])


class Returns(Module):
    def __init__(self, result):
        super().__init__()
        self.result = result

    def training_step(self, some, batch_idx):
        return self.result(self.mean_loss(some))


def test_a_mapping_with_the_loss_is_a_loss_and_none_is_a_batch_without_an_update():
    expected = fit()
    found = fit(strategy(), lambda: Returns(lambda loss: {"loss": loss}))
    assert found.global_step == 6
    torch.manual_seed(7)
    untouched = {name: one.detach().clone() for name, one in Module().named_parameters()}
    nothing = fit(strategy(), lambda: Returns(lambda loss: None))
    assert relative_difference(parameters(found), parameters(expected)) < 1e-6
    assert all(torch.equal(one, untouched[name]) for name, one in parameters(nothing).items())


@pytest.mark.parametrize(("weight", "what"), [(None, "the number of samples, as there is no weight="),
                                              (lambda micro: len(micro) ** 2, "what weight= returns")])
def test_a_weight_that_does_not_fit_the_loss_is_refused(weight, what):
    with pytest.raises(mb.UsageError, match=f"the loss of training_step is not a mean over {what}.*give weight="):
        fit(MicrobatchStrategy(weight))


def test_a_check_that_runs_out_of_memory_takes_fewer_samples():
    class Tight(Module):
        def training_step(self, some, batch_idx):
            if not self.training and len(some) > 2:
                raise torch.OutOfMemoryError("drill")
            return self.mean_loss(some)

    assert fit(strategy(), Tight).global_step == 6
    with pytest.raises(mb.UsageError, match="for the first 2 samples together"):
        fit(MicrobatchStrategy(lambda micro: len(micro) ** 2), Tight)


class Manual(Module):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class OwnBackward(Module):
    def backward(self, loss):
        loss.backward()


class OwnLoader(Module):
    def training_step(self, dataloader_iter):
        return self.mean_loss(next(dataloader_iter)[0])


class OwnMetric(Module):
    def __init__(self):
        super().__init__()
        self.metric = torchmetrics.PearsonCorrCoef()

    def training_step(self, some, batch_idx):
        self.metric(torch.rand(4), torch.rand(4))
        self.log("correlation", self.metric)
        return self.mean_loss(some)


class OwnReduction(Module):
    def training_step(self, some, batch_idx):
        self.log("median", self.mean_loss(some), reduce_fx=torch.median)
        return self.mean_loss(some)


@pytest.mark.parametrize(("module", "how", "message"), [
    (Module, {"accumulate_grad_batches": 4}, "accumulate_grad_batches is 4: leave it out.*whole batches"),
    (Module, {"callbacks": [GradientAccumulationScheduler({1: 2})]}, "accumulate_grad_batches is 2"),
    (Manual, {}, "the module optimizes manually.*leave the strategy out"),
    (OwnBackward, {}, r"a backward\(\) of its own.*leave it out"),
    (OwnLoader, {}, "takes dataloader_iter"),
    (OwnMetric, {}, "log.'correlation'.*PearsonCorrCoef cannot tell one batch.*on_step=False"),
    (OwnReduction, {}, "reduce_fx=.*median.*joined by 'mean', 'sum', 'max' or 'min'"),
    (lambda: Returns(lambda loss: {"loss": loss, "best": 1}), {}, "returns 'best' beside the loss.*log it"),
])
def test_what_is_not_supported_is_refused(module, how, message):
    with pytest.raises(mb.UsageError, match=message):
        fit(strategy(), module, **how)


@pytest.mark.parametrize(("accelerator", "device", "message"), [
    (L.pytorch.accelerators.CUDAAccelerator(), "cpu", "is a CUDAAccelerator.*accelerator='cpu'.*device='cuda:0'"),
    (L.pytorch.accelerators.CPUAccelerator(), "cuda:1", "is a CPUAccelerator.*accelerator='cuda'.*device='cpu'"),
    (L.pytorch.accelerators.CPUAccelerator(), "gpu-1", "device is 'gpu-1'; it is a device such as"),
])
def test_an_accelerator_for_another_device_is_refused(monkeypatch, accelerator, device, message):
    with pytest.raises(mb.UsageError, match=message):
        kind = strategy(device=device)
        monkeypatch.setattr(kind, "_accelerator", accelerator)
        kind.setup(None)


def test_scaled_gradients_are_refused():
    kind = strategy(accelerator=L.pytorch.accelerators.CPUAccelerator())
    kind.precision_plugin = L.pytorch.plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(mb.UsageError, match="float16 needs scaled gradients.*precision='bf16-mixed'"):
        kind.setup(None)


@pytest.mark.parametrize(("how", "message"), [({"weight": 3}, "weight is a int"), ({"memory": "much"}, "much"),
                                              ({"micro_batch": 0}, "micro_batch is 0")])
def test_a_wrong_argument_is_refused(how, message):
    with pytest.raises(mb.UsageError, match=message):
        strategy(**how)
