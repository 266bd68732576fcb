#!/usr/bin/env python3
"""A whole run of a PyTorch model in a folder, within a memory budget; the same command resumes it where it stopped."""

import argparse
import pathlib

import microbatch as mb
import torch
from torch import nn
from torch.nn import functional

PADDING, WIDTH, HEADS = 256, 96, 4


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.attention = nn.Linear(WIDTH, 3 * WIDTH)
        self.project = nn.Linear(WIDTH, WIDTH)
        self.wide = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x):
        heads = self.attention(self.norms[0](x)).unflatten(-1, (3, HEADS, WIDTH // HEADS)).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.project(attended)
        return x + self.wide(self.norms[1](x))


class ByteModel(nn.Module):
    def __init__(self, longest=160, blocks=3):
        super().__init__()
        self.tokens, self.places = nn.Embedding(PADDING + 1, WIDTH), nn.Embedding(longest, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, PADDING))

    def forward(self, ids):
        x = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def read_texts(path, longest=160):
    texts = pathlib.Path(path).read_text(encoding="utf-8").split("\n%\n")
    return [torch.tensor(list(text.encode()[:longest])) for text in texts if len(text) > 1]


def collate(texts):
    return nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=PADDING)


def loss(model, texts):
    """The sum over the bytes that count, and their number."""
    targets = texts[:, 1:]
    logits = model(texts[:, :-1]).transpose(1, 2)
    total = functional.cross_entropy(logits, targets, ignore_index=PADDING, reduction="sum")
    return total, (targets != PADDING).sum()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="/usr/share/games/fortunes/fortunes", help="texts with %% between them")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--memory", default="32MiB")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--run", default="runs/python")
    options = parser.parse_args()

    torch.manual_seed(0)
    texts = read_texts(options.data)
    train, unseen = texts[:-64], texts[-64:]
    trainer = mb.Trainer(
        ByteModel(), train, loss, batch=options.batch, memory=options.memory, lr=2e-3, steps=options.steps,
        warmup=min(10, options.steps // 4), run=options.run, resume=True, collate_fn=collate, lengths=list(map(len, train)),
        held_out=unseen,
    )
    outcome = trainer.train()
    print(trainer.plan_report)
    print(f"loss {outcome.first_loss:.4f} at first, {outcome.loss:.4f} at last, {outcome.held_out_loss:.4f} held out")
    print(f"peak {mb.memory.format_size(outcome.peak_bytes)} of {options.memory}; written {outcome.run}")


if __name__ == "__main__":
    main()
