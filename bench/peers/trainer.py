"""The Trainer of Hugging Face Transformers.  usage: trainer.py MODEL BATCH MICRO_BATCH STEPS THREADS"""

import sys
import tempfile

from torch import nn
from torch.utils.data import default_collate
from transformers import Trainer, TrainerCallback, TrainingArguments

from model import loss_of
from task import CLIP_NORM, WEIGHT_DECAY, Task


class WithLoss(nn.Module):
    """The Trainer wants a model that returns its loss."""

    def __init__(self, task):
        super().__init__()
        self.task, self.model = task, task.model()

    def forward(self, inputs, labels):
        loss = loss_of(self.model, inputs, labels)
        self.task.note_loss(loss)
        return {"loss": loss}


class Clock(TrainerCallback):
    def __init__(self, task):
        self.task = task

    def on_train_begin(self, *_, **__):
        self.task.begin()

    def on_step_end(self, *_, **__):
        self.task.end_step()


def collate(rows):
    inputs, labels = default_collate(rows)
    return {"inputs": inputs, "labels": labels}


def main():
    task = Task(sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder, max_steps=task.optimizer_steps, per_device_train_batch_size=task.micro_batch,
            gradient_accumulation_steps=task.accumulation_steps, max_grad_norm=CLIP_NORM, optim="adamw_torch_fused",
            learning_rate=task.learning_rate, weight_decay=WEIGHT_DECAY, lr_scheduler_type="constant", use_cpu=True,
            report_to=[], logging_strategy="no", save_strategy="no", disable_tqdm=True, remove_unused_columns=False,
            dataloader_pin_memory=False, seed=1)
        trainer = Trainer(WithLoss(task), settings, train_dataset=task.dataset(), data_collator=collate,
                          callbacks=[Clock(task)])
        trainer.train()
    task.report()


main()
