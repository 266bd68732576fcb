"""Hugging Face's Trainer: the same run as before, with the update of the whole batch."""

import gc
import random

import models
import peft
import pytest
import tokenizers
import torch
import transformers
from conftest import relative_difference
from torch import nn
from transformers import TrainingArguments

import microbatch as mb
from microbatch import _core
from microbatch.integrations.transformers import STATE_FILE, Seq2SeqTrainer, Trainer, loss_of

SAMPLES, BATCH, MICRO = 19, 8, 2  # an epoch is two whole batches and one of 3


def samples_of(batch):
    """Samples without padding, as a tokenizer makes them."""
    lengths = batch["attention_mask"].sum(1)
    return [{name: one[i, : lengths[i]] if one.dim() > 1 else one[i] for name, one in batch.items()}
            for i in range(len(lengths))]


def collate(samples):
    batch = {}
    for name in samples[0]:
        values = [one[name] for one in samples]
        padding = -100 if name == "labels" else 0
        ragged = values[0].dim() > 0
        batch[name] = nn.utils.rnn.pad_sequence(values, True, padding) if ragged else torch.stack(values)
    return batch


def text(kind):
    batch = models.ragged(samples=SAMPLES)
    if kind == "bert_classifier":
        batch["labels"] = torch.arange(SAMPLES) % 3
    if kind == "gpt2":
        batch["labels"][:, 0] = -100  # transformers 5.24 counts it for GPT-2, though nothing predicts it
    return samples_of(batch)


def arguments(folder, **more):
    settings = {"per_device_train_batch_size": MICRO, "gradient_accumulation_steps": BATCH // MICRO, "logging_steps": 1,
                "num_train_epochs": 2, "learning_rate": 5e-3, "save_strategy": "no", "report_to": [], "use_cpu": True,
                "disable_tqdm": True}
    return TrainingArguments(str(folder), **(settings | more))


def whole(**more):
    """Settings by which transformers.Trainer has no need to accumulate."""
    return {"per_device_train_batch_size": BATCH, "gradient_accumulation_steps": 1} | more


def train(kind, folder, trainer_class=Trainer, model=None, resume=None, *, named=None, **settings):
    torch.manual_seed(7)
    model = getattr(models, kind)()[0] if model is None else model
    named = {"train_dataset": text(kind), "data_collator": collate} | (named or {})
    trainer = trainer_class(model, arguments(folder, **settings), **named)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def parameters(trainer):
    return {name: one.detach().clone() for name, one in trainer.model.named_parameters()}


def logged(trainer, name):
    return [one[name] for one in trainer.state.log_history if name in one]


KINDS = ["gpt2", "llama", "bert", "bert_classifier", "t5"]


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_losses_and_norms_are_those_of_the_whole_batch_at_once(kind, tmp_path):
    # SGD, because Adam magnifies the rounding of gradients that are nearly zero.
    optimizer = {"optim": "sgd", "learning_rate": 0.1}
    expected = train(kind, tmp_path, transformers.Trainer, **whole(**optimizer))
    found = train(kind, tmp_path, named={"micro_batch": 3}, **optimizer)
    # Sums of a few hundred terms in another order, over 6 steps.
    assert relative_difference(parameters(found), parameters(expected)) < 1e-6
    assert found.state.global_step == expected.state.global_step == 6
    assert logged(found, "loss") == pytest.approx(logged(expected, "loss"), rel=1e-5)
    assert logged(found, "grad_norm") == pytest.approx(logged(expected, "grad_norm"), rel=1e-5)
    assert logged(found, "learning_rate") == logged(expected, "learning_rate")


def test_with_adam_a_warm_up_and_a_plan_of_its_own_it_is_the_same_run(tmp_path):
    how = {"warmup_steps": 3, "lr_scheduler_type": "cosine", "weight_decay": 0.1, "max_grad_norm": 0.3}
    expected = train("llama", tmp_path, transformers.Trainer, **whole(**how))
    found = train("llama", tmp_path, named={"memory": "256MiB"}, **how)
    assert found.accumulator.last_plan is not None
    # Adam divides by the root of small second moments, which magnifies rounding where a gradient is nearly zero.
    assert relative_difference(parameters(found), parameters(expected)) < 2e-5


def test_trainers_own_accumulation_is_far_off_where_the_model_averages_by_itself(tmp_path):
    expected = train("bert", tmp_path, transformers.Trainer, **whole(optim="sgd", learning_rate=0.1))
    accumulated = train("bert", tmp_path, transformers.Trainer, optim="sgd", learning_rate=0.1)
    assert relative_difference(parameters(accumulated), parameters(expected)) > 1e-3


class Recorder(transformers.TrainerCallback):
    def __init__(self):
        self.events = []

    def __getattribute__(self, name):
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def record(arguments, state, control, **_):
            self.events.append((name, state.global_step, round(state.epoch or 0.0, 6)))

        return record


@pytest.mark.parametrize("how", [{}, {"dataloader_drop_last": True}, {"max_steps": 4, "num_train_epochs": 1},
                                 {"dataloader_num_workers": 1}, {"train_sampling_strategy": "group_by_length"}])
def test_callbacks_fire_as_often_and_at_the_same_steps(how, tmp_path):
    events, tokens = [], []
    for trainer_class in (transformers.Trainer, Trainer):
        recorder = Recorder()
        named = {"callbacks": [recorder], "eval_dataset": text("bert")[:5]}
        settings = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 3,
                    "include_num_input_tokens_seen": "non_padding"} | how
        trainer = train("bert", tmp_path / trainer_class.__module__, trainer_class, named=named, **settings)
        events.append(recorder.events)
        tokens.append(trainer.state.num_input_tokens_seen)
        assert trainer.state.total_flos > 0
    assert events[0] == events[1]
    assert tokens[0] == tokens[1] > 0


def test_evaluation_and_the_saved_model_are_as_before(tmp_path):
    trainer = train("gpt2", tmp_path, named={"eval_dataset": text("gpt2")[:5]}, max_steps=2)
    stock = transformers.Trainer(trainer.model, trainer.args, collate, eval_dataset=text("gpt2")[:5])
    assert trainer.evaluate()["eval_loss"] == stock.evaluate()["eval_loss"]
    trainer.save_model(tmp_path / "saved")
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(one, dict(again.named_parameters())[name]) for name, one in parameters(trainer).items())


def with_dropout():
    config = models.gpt2()[0].config
    config.resid_pdrop = config.attn_pdrop = 0.2
    torch.manual_seed(7)
    return transformers.GPT2LMHeadModel(config)


class Masking:
    """As collators for masked language models: every call draws other labels."""

    def __init__(self):
        self.seen = []

    def __call__(self, samples):
        batch = collate(samples)
        drawn = torch.rand(batch["labels"].shape) < 0.3 + 0.2 * random.random()
        batch["labels"] = batch["labels"].masked_fill(~drawn, -100)
        self.seen.append(batch)
        return batch


@pytest.mark.parametrize("at", [3, 4])
def test_a_resumed_run_has_the_bits_of_one_that_went_through(at, tmp_path):
    named = {"data_collator": Masking()}
    whole_run = train("gpt2", tmp_path, model=with_dropout(), named=named, save_strategy="steps", save_steps=1)
    checkpoint = tmp_path / f"checkpoint-{at}"
    assert (checkpoint / STATE_FILE).is_file()
    resumed = train("gpt2", tmp_path / "again", model=with_dropout(), resume=str(checkpoint), named=named)
    assert resumed.state.global_step == 6
    assert resumed.accumulator.last_plan is None  # taken over from the checkpoint
    expected = parameters(whole_run)
    assert all(torch.equal(one, expected[name]) for name, one in parameters(resumed).items())


def test_a_checkpoint_of_transformers_trainer_is_resumed(tmp_path):
    settings = {"optim": "sgd", "learning_rate": 0.1, "save_strategy": "steps", "save_steps": 4}
    expected = train("bert", tmp_path, transformers.Trainer, **whole(**settings))
    resumed = train("bert", tmp_path / "again", resume=str(tmp_path / "checkpoint-4"), **whole(**settings))
    assert resumed.state.global_step == 6
    assert relative_difference(parameters(resumed), parameters(expected)) < 1e-6


def test_a_collator_that_draws_labels_is_averaged_over_what_it_drew(tmp_path):
    collator, losses = Masking(), []

    class Compare(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **_):
            with torch.no_grad():
                parts = [mb.losses.masked_lm(model, micro) for micro in collator.seen[-3:]]
            losses.append(float(sum(one for one, _ in parts)) / sum(weight for _, weight in parts))

    named = {"data_collator": collator, "callbacks": [Compare()], "micro_batch": 3, "loss": mb.losses.masked_lm}
    trainer = train("bert", tmp_path, named=named, max_steps=2)
    assert losses == pytest.approx(logged(trainer, "loss"), rel=1e-5)


def test_the_check_of_the_loss_leaves_no_trace(tmp_path):
    runs = []
    for loss in (None, mb.losses.causal_lm):
        named = {"loss": loss, "micro_batch": 3, "data_collator": Masking()}
        runs.append(parameters(train("gpt2", tmp_path, model=with_dropout(), named=named)))
    assert all(torch.equal(one, runs[1][name]) for name, one in runs[0].items())


def tokenized(texts):
    """By a tokenizer of words, as lists, and the tokenizer."""
    words = {"[PAD]": 0, "[UNK]": 1} | {f"w{i}": i + 2 for i in range(models.VOCABULARY - 2)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")
    return [dict(tokenizer(one)) for one in texts], tokenizer


def test_the_collators_of_transformers_make_micro_batches(tmp_path):
    generator = random.Random(1)
    texts = [" ".join(f"w{generator.randrange(90)}" for _ in range(generator.randrange(3, 12))) for _ in range(SAMPLES)]
    data, tokenizer = tokenized(texts)
    cases = [("llama", transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False), data),
             ("llama", transformers.DataCollatorWithFlattening(), [{"input_ids": one["input_ids"]} for one in data]),
             ("t5", transformers.DataCollatorForSeq2Seq(tokenizer),
              [one | {"labels": one["input_ids"]} for one in data]),
             ("bert_classifier", transformers.DataCollatorWithPadding(tokenizer),
              [one | {"label": i % 3} for i, one in enumerate(data)])]
    settings = {"optim": "sgd", "learning_rate": 0.1}
    for kind, collator, samples in cases:
        named = {"data_collator": collator, "train_dataset": samples}
        expected = train(kind, tmp_path, transformers.Trainer, named=named, **whole(**settings))
        found = train(kind, tmp_path, named=named | {"micro_batch": 3}, **settings)
        assert relative_difference(parameters(found), parameters(expected)) < 1e-6, type(collator)


def test_samples_of_similar_length_are_collated_together(tmp_path):
    widths = []

    def recording(samples):
        batch = collate(samples)
        widths.append([len(one["input_ids"]) for one in samples])
        return batch

    named = {"data_collator": recording, "micro_batch": 2, "loss": mb.losses.causal_lm}
    train("llama", tmp_path, named=named, max_steps=1)
    flat = [length for micro in widths for length in micro]
    assert flat == sorted(flat, reverse=True)
    assert [len(micro) for micro in widths] == [2, 2, 2, 2]


def test_out_of_memory_in_the_middle_of_a_run_ends_in_the_same_update(tmp_path):
    reports = []

    class Failing(Trainer):
        def training_step(self, *args):
            _core.fail_allocation(40 if self.state.global_step == 1 and self.accelerator.sync_gradients else 0)
            loss = super().training_step(*args)
            _core.fail_allocation(0)
            reports.append(self.last_report)
            return loss

    settings = {"optim": "sgd", "learning_rate": 0.1}
    expected = train("bert", tmp_path, transformers.Trainer, **whole(**settings))
    found = train("bert", tmp_path, Failing, named={"micro_batch": 8}, **settings)
    found_out = [one for one in reports if one is not None and one.out_of_memory]
    assert {(one.out_of_memory, one.plan.micro_batch, one.micro_batches) for one in found_out} == {(1, 4, 2)}
    assert relative_difference(parameters(found), parameters(expected)) < 1e-6


def room_for(model, activations):
    """A budget that holds what there is, a gradient, the two moments of Adam, and activations."""
    gc.collect()
    weights = sum(one.nbytes for one in model.parameters())
    return mb.memory.stats().live_bytes + 3 * weights + mb.memory.parse_size(activations)


def test_a_budget_is_kept_from_the_first_step_on_with_the_optimizers_state(tmp_path):
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3}
    mb.memory.install()
    model = transformers.BertForMaskedLM(models._small(transformers.BertConfig, **sizes))
    long = samples_of(models.ragged(samples=64, longest=32))
    named = {"train_dataset": long, "memory": room_for(model, "8MiB")}
    trainer = train("bert", tmp_path, model=model, named=named, per_device_train_batch_size=64,
                    gradient_accumulation_steps=1, max_steps=3)
    assert trainer.last_report.micro_batches > 1
    assert trainer.last_report.peak_bytes <= mb.memory.stats().budget_bytes
    too_small = named | {"memory": mb.memory.stats().live_bytes + (1 << 20)}
    with pytest.raises(mb.DoesNotFit):
        train("bert", tmp_path, model=model, named=too_small, max_steps=1)


def test_label_smoothing_is_that_of_the_whole_batch(tmp_path):
    settings = {"optim": "sgd", "learning_rate": 0.1, "label_smoothing_factor": 0.2}
    for kind in ("llama", "bert_classifier", "t5"):
        def with_inputs(samples, kind=kind):
            batch = collate(samples)
            if kind == "t5":  # transformers' smoother takes the labels away from the model
                batch["decoder_input_ids"] = models.t5()[0]._shift_right(batch["labels"])
            return batch

        named = {"data_collator": with_inputs}
        expected = train(kind, tmp_path, transformers.Trainer, named=named, **whole(**settings))
        found = train(kind, tmp_path, named=named | {"micro_batch": 3}, **settings)
        assert relative_difference(parameters(found), parameters(expected)) < 1e-6, kind
        assert logged(found, "loss") == pytest.approx(logged(expected, "loss"), rel=1e-5)


def test_bf16_is_as_close_as_bf16_is(tmp_path):
    settings = {"optim": "sgd", "learning_rate": 0.1, "bf16": True}
    expected = train("llama", tmp_path, transformers.Trainer, **whole(**settings))
    found = train("llama", tmp_path, named={"micro_batch": 3}, **settings)
    # 8 bits of mantissa: 4e-3 for a product, averaged over many.
    assert logged(found, "loss") == pytest.approx(logged(expected, "loss"), rel=4e-3)
    assert relative_difference(parameters(found), parameters(expected)) < 4e-3


def test_a_dataset_without_a_length_is_read_to_its_end(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(text("bert"))

    settings = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.1}
    expected = train("bert", tmp_path, transformers.Trainer, named={"train_dataset": Stream()}, **whole(**settings))
    found = train("bert", tmp_path, named={"train_dataset": Stream()}, **settings)
    assert relative_difference(parameters(found), parameters(expected)) < 1e-6


def test_a_stream_that_ends_within_a_batch_loses_no_sample(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(text("bert_classifier"))

    trainer = train("bert_classifier", tmp_path, named={"train_dataset": Stream()}, max_steps=3)
    assert trainer.last_report.weight == 3 + BATCH  # the rest of the first epoch, and the next batch


def test_a_loader_of_the_users_may_deliver_whole_batches(tmp_path):
    class Own(Trainer):
        def get_train_dataloader(self):
            size = self.args.per_device_train_batch_size
            return torch.utils.data.DataLoader(self.train_dataset, size, collate_fn=collate)

    settings = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.1, "train_sampling_strategy": "sequential"}
    expected = train("bert", tmp_path, transformers.Trainer, **whole(**settings))
    found = train("bert", tmp_path, Own, named={"micro_batch": 3}, **whole(**settings))
    assert relative_difference(parameters(found), parameters(expected)) < 1e-6
    with pytest.raises(mb.UsageError, match="collated already.*gradient_accumulation_steps=1"):
        train("bert", tmp_path, Own, **settings)


def test_lora_trains_and_saves_its_adapter(tmp_path):
    model = models.lora()[0]
    frozen = {name: one.detach().clone() for name, one in model.named_parameters() if not one.requires_grad}
    trainer = train("gpt2", tmp_path, model=model, max_steps=2, save_strategy="steps", save_steps=2)
    assert all(torch.equal(one, frozen[name]) for name, one in parameters(trainer).items() if name in frozen)
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").is_file()


def test_the_seq2seq_trainer_generates_in_evaluation(tmp_path):
    torch.manual_seed(7)
    settings = {"max_steps": 1, "use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    generating = {"predict_with_generate": True, "generation_max_length": 4}
    how = transformers.Seq2SeqTrainingArguments(str(tmp_path), **settings, **generating)
    seen = []
    trainer = Seq2SeqTrainer(models.t5()[0], how, collate, text("t5"), text("t5")[:4], micro_batch=3,
                             compute_metrics=lambda found: seen.append(found.predictions.shape) or {})
    trainer.train()
    trainer.evaluate()
    assert seen[0][0] == 4


def test_a_second_training_and_a_model_made_anew_start_afresh(tmp_path):
    trainer = Trainer(None, arguments(tmp_path, max_steps=2), collate, text("llama"), micro_batch=3,
                      model_init=lambda: models.llama()[0])
    runs = []
    for _ in range(2):
        trainer.train()
        runs.append(parameters(trainer))
    assert all(torch.equal(one, runs[1][name]) for name, one in runs[0].items())


class Regressor(nn.Module):
    def __init__(self):
        super().__init__()
        self.line = nn.Linear(3, 1)

    def forward(self, x, labels=None):
        found = self.line(x)[:, 0]
        return {"loss": None if labels is None else (found - labels).square().mean(), "logits": found}


def squares(model, micro):
    return (model(micro["x"])["logits"] - micro["labels"]).square().sum(), len(micro["labels"])


def points():
    return [{"x": torch.randn(3), "labels": torch.randn(())} for _ in range(SAMPLES)]


def test_a_model_of_your_own_trains_with_a_loss_of_your_own(tmp_path):
    settings = {"optim": "sgd", "learning_rate": 0.1}
    data, runs = points(), []
    for trainer_class, named, more in ((transformers.Trainer, {}, whole()), (Trainer, {"loss": squares}, {})):
        torch.manual_seed(1)
        named = {"train_dataset": data, "eval_dataset": data[:4]} | named
        trainer = train("", tmp_path, trainer_class, Regressor(), named=named, **(settings | more))
        runs.append(parameters(trainer))
        assert trainer.evaluate()["eval_loss"] > 0.0
    assert relative_difference(runs[1], runs[0]) < 1e-6


@pytest.mark.parametrize(("name", "loss"), [("gpt2", "causal_lm"), ("qwen2", "causal_lm"), ("bert", "masked_lm"),
                                            ("bert_classifier", "sequence_classification"), ("t5", "seq2seq_lm"),
                                            ("roberta", "token_classification"), ("vit", "image_classification"),
                                            ("whisper", "seq2seq_lm"), ("lora", "causal_lm")])
def test_the_loss_follows_from_the_models_class(name, loss):
    assert loss_of(models.EXACT[name]()[0]) is getattr(mb.losses, loss)


class Doubled(transformers.LlamaForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, labels=None, **named):
        outputs = super().forward(input_ids, attention_mask=attention_mask, labels=labels, **named)
        outputs.loss = None if outputs.loss is None else 2 * outputs.loss
        return outputs


class Tight(transformers.LlamaForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, labels=None, **named):
        if not self.training and len(input_ids) > 1:
            raise torch.OutOfMemoryError("drill")
        return super().forward(input_ids, attention_mask=attention_mask, labels=labels, **named)


class MeanLoss(Trainer):
    def compute_loss(self, model, inputs, **named):
        return model(**inputs).loss


def test_prompt_tuning_needs_a_loss():
    model = peft.get_peft_model(models.gpt2()[0], peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(mb.UsageError, match="prompt tuning adds tokens that have no labels: give loss="):
        loss_of(model)


def test_an_unknown_loss_is_refused():
    with pytest.raises(mb.UsageError, match="the loss of Regressor is not known: give loss="):
        loss_of(Regressor())


@pytest.mark.parametrize(("named", "message"), [
    ({"compute_loss_func": lambda outputs, labels, num_items_in_batch: outputs.loss},
     "compute_loss_func does not say what its loss is averaged over: give loss="),
    ({"loss": 3}, "loss is a int; it is a function"),
    ({"micro_batch": 0}, "micro_batch is 0; it is a number of samples"),
    ({"memory": "much"}, "much"),
    ({"recompute": "sometimes"}, "recompute is 'sometimes'"),
])
def test_a_wrong_argument_is_refused(named, message, tmp_path):
    with pytest.raises(mb.UsageError, match=message):
        Trainer(models.llama()[0], arguments(tmp_path), collate, text("llama"), **named)


def test_a_loss_that_is_overridden_or_differs_from_the_models_own_is_refused(tmp_path):
    with pytest.raises(mb.UsageError, match="compute_loss does not say.*compute_loss is then for evaluation"):
        MeanLoss(models.llama()[0], arguments(tmp_path), collate, text("llama"))
    MeanLoss(models.llama()[0], arguments(tmp_path), collate, text("llama"), loss=mb.losses.causal_lm)
    model = Doubled(models.llama()[0].config)
    with pytest.raises(mb.UsageError, match="the own loss of Doubled is .* that of causal_lm.* give loss="):
        train("llama", tmp_path, model=model)
    assert train("llama", tmp_path, model=Tight(models.llama()[0].config), max_steps=1).state.global_step == 1
    unlabelled = [{"input_ids": one["input_ids"], "attention_mask": one["attention_mask"]} for one in text("llama")]
    with pytest.raises(mb.UsageError, match="returns no loss: give the samples labels"):
        train("llama", tmp_path, named={"train_dataset": unlabelled})


@pytest.mark.parametrize(("setting", "message"), [
    ({"auto_find_batch_size": True}, "auto_find_batch_size changes the batch.*leave it out"),
    ({"optim": "adalomo"}, "optim='adalomo' steps during backward"),
    ({"optim": "galore_adamw_layerwise"}, "optim='galore_adamw_layerwise' steps during backward"),
    ({"use_liger_kernel": True}, "use_liger_kernel leaves the model without logits"),
    ({"fp16": True}, "fp16 needs gradients that are scaled.*bf16=True"),
    ({"deepspeed": "config.json"}, "DeepSpeed, FSDP and other sharded models are not supported"),
    ({"fsdp": True}, "DeepSpeed, FSDP and other sharded models are not supported"),
    ({"world_size": 2}, "there are 2 processes"),
    ({"n_gpu": 2}, "would be spread over 2 GPUs.*CUDA_VISIBLE_DEVICES=0"),
])
def test_a_setting_that_is_not_supported_is_refused(setting, message, tmp_path):
    class Settings:
        """Arguments of a machine that this is not: some cannot be made here."""

        def __getattr__(self, name):
            return setting[name] if name in setting else getattr(plain, name)

    plain = arguments(tmp_path)
    with pytest.raises(mb.UsageError, match=message):
        Trainer(models.llama()[0], Settings(), collate, text("llama"))


def test_settings_that_contradict_each_other_are_refused(tmp_path):
    with pytest.raises(mb.UsageError, match="activation_checkpointing=True recomputes already"):
        Trainer(models.llama()[0], arguments(tmp_path, activation_checkpointing=True), collate, recompute="always")
    with pytest.raises(mb.UsageError, match="label_smoothing_factor is 0.1, and loss= is given"):
        Trainer(models.llama()[0], arguments(tmp_path, label_smoothing_factor=0.1), collate, loss=mb.losses.causal_lm)


def test_recomputing_changes_no_bit(tmp_path):
    runs = []
    for named, more in (({}, {}), ({"recompute": "always"}, {}), ({}, {"activation_checkpointing": True})):
        how = {"micro_batch": 3} | named
        runs.append(parameters(train("gpt2", tmp_path, model=with_dropout(), named=how, max_steps=2, **more)))
    for other in runs[1:]:
        assert all(torch.equal(one, other[name]) for name, one in runs[0].items())


def test_a_mean_that_is_given_as_loss_is_refused_at_the_first_batch(tmp_path):
    def mean(model, micro):
        return model(**micro).loss, len(micro["labels"])

    with pytest.raises(mb.UsageError, match="the loss is already averaged"):
        train("bert_classifier", tmp_path, named={"loss": mean})
