"""The plain PyTorch loop.  usage: loop.py adamw|fused|compile MODEL BATCH MICRO_BATCH STEPS THREADS"""

import sys

import torch

from model import loss_of
from task import CLIP_NORM, WEIGHT_DECAY, Task


def main():
    variant, task = sys.argv[1], Task(sys.argv[2:])
    model = task.model()
    fused = None if variant == "adamw" else True
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.learning_rate, weight_decay=WEIGHT_DECAY, fused=fused)
    if variant == "compile":
        model = torch.compile(model)
    loader = task.loader()
    task.begin()
    for micro, (inputs, labels) in enumerate(loader, start=1):
        loss = loss_of(model, inputs, labels)
        (loss / task.accumulation_steps).backward()
        task.note_loss(loss)
        if micro % task.accumulation_steps == 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
            optimizer.step()
            optimizer.zero_grad()
            if task.end_step():
                break
    task.report()


main()
