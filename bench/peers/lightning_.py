"""Lightning.  usage: lightning_.py MODEL BATCH MICRO_BATCH STEPS THREADS"""

import sys

import lightning
import torch

from model import loss_of
from task import CLIP_NORM, WEIGHT_DECAY, Task


class Module(lightning.LightningModule):
    def __init__(self, task):
        super().__init__()
        self.task, self.model = task, task.model()

    def training_step(self, batch, _):
        loss = loss_of(self.model, *batch)
        self.task.note_loss(loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(
            self.parameters(), lr=self.task.learning_rate, weight_decay=WEIGHT_DECAY, fused=True)

    def on_train_start(self):
        self.task.begin()

    def on_train_batch_end(self, *_):
        if self.global_step == len(self.task.ends):  # it counts optimizer steps
            self.task.end_step()


def main():
    task = Task(sys.argv[1:])
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=task.optimizer_steps, accumulate_grad_batches=task.accumulation_steps,
        gradient_clip_val=CLIP_NORM, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False)
    trainer.fit(Module(task), task.loader())
    task.report()


main()
