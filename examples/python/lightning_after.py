#!/usr/bin/env python3
"""Trains a language model on the bytes of fortunes, with Lightning's Trainer."""

import argparse
import pathlib

import lightning as L
import torch
from microbatch.integrations.lightning import MicrobatchStrategy
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

PADDING = -100


class ByteModel(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(256, 48)
        self.recurrent = nn.GRU(48, 96, batch_first=True)
        self.head = nn.Linear(96, 256)

    def mean_loss(self, texts):
        logits = self.head(self.recurrent(self.embedding(texts[:, :-1].clamp(min=0)))[0])
        return functional.cross_entropy(logits.transpose(1, 2), texts[:, 1:], ignore_index=PADDING)

    def training_step(self, texts, batch_idx):
        loss = self.mean_loss(texts)
        self.log("loss", loss, prog_bar=True, batch_size=int(count_targets(texts)))
        return loss

    def validation_step(self, texts, batch_idx):
        self.log("held-out loss", self.mean_loss(texts), batch_size=int(count_targets(texts)))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def read_texts(path, longest=160):
    texts = pathlib.Path(path).read_text(encoding="utf-8").split("\n%\n")
    return [torch.tensor(list(text.encode()[:longest])) for text in texts if len(text) > 1]


def collate(texts):
    return nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=PADDING)


def count_targets(texts):
    return (texts[:, 1:] != PADDING).sum()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="/usr/share/games/fortunes/fortunes", help="texts with %% between them")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", help="file for the weights")
    options = parser.parse_args()

    L.seed_everything(0)
    model = ByteModel()
    texts = read_texts(options.data)
    unseen = DataLoader(texts[-64:], batch_size=16, collate_fn=collate)
    loader = DataLoader(texts[:-64], batch_size=options.batch, shuffle=True, collate_fn=collate)
    trainer = L.Trainer(
        strategy=MicrobatchStrategy(count_targets, memory="1GiB"),
        accelerator="cpu", max_steps=options.steps, gradient_clip_val=1.0, logger=False, enable_checkpointing=False)
    trainer.fit(model, loader)
    trainer.validate(model, unseen)
    if options.out:
        torch.save(model.state_dict(), options.out)


if __name__ == "__main__":
    main()
