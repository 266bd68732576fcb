"""Hugging Face Accelerate.  usage: accelerate_.py MODEL BATCH MICRO_BATCH STEPS THREADS"""

import sys

import torch
from accelerate import Accelerator

from model import loss_of
from task import CLIP_NORM, WEIGHT_DECAY, Task


def main():
    task = Task(sys.argv[1:])
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=task.accumulation_steps)
    model = task.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.learning_rate, weight_decay=WEIGHT_DECAY, fused=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, task.loader())
    task.begin()
    for inputs, labels in loader:
        with accelerator.accumulate(model):
            loss = loss_of(model, inputs, labels)
            accelerator.backward(loss)
            task.note_loss(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), CLIP_NORM)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients and task.end_step():
            break
    task.report()


main()
