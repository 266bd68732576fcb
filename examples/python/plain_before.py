#!/usr/bin/env python3
"""Trains a language model on the bytes of fortunes, in a plain loop whose batch may be larger than memory."""

import argparse
import itertools
import pathlib

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

PADDING = -100


class ByteModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(256, 48)
        self.recurrent = nn.GRU(48, 96, batch_first=True)
        self.head = nn.Linear(96, 256)

    def forward(self, ids):
        return self.head(self.recurrent(self.embedding(ids))[0])


def read_texts(path, longest=160):
    texts = pathlib.Path(path).read_text(encoding="utf-8").split("\n%\n")
    return [torch.tensor(list(text.encode()[:longest])) for text in texts if len(text) > 1]


def collate(texts):
    return nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=PADDING)


def mean_loss(model, texts):
    logits = model(texts[:, :-1].clamp(min=0))
    return functional.cross_entropy(logits.transpose(1, 2), texts[:, 1:], ignore_index=PADDING)


def weight(texts):
    return (texts[:, 1:] != PADDING).sum()


def endless(loader):
    while True:
        yield from loader


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="/usr/share/games/fortunes/fortunes", help="texts with %% between them")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", help="file for the weights")
    options = parser.parse_args()

    torch.manual_seed(0)
    model = ByteModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    texts = read_texts(options.data)
    unseen = collate(texts[-64:])
    loader = DataLoader(texts[:-64], batch_size=options.batch, shuffle=True, collate_fn=collate)
    for batch in itertools.islice(endless(loader), options.steps):
        pieces = batch.split(options.micro_batch)
        for piece in pieces:
            (mean_loss(model, piece) / len(pieces)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        print(f"held-out loss {mean_loss(model, unseen):.4f} over {weight(unseen)} bytes")
    if options.out:
        torch.save(model.state_dict(), options.out)


if __name__ == "__main__":
    main()
