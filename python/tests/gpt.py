"""The command's GPT as a Python module: the same operators, parameters in the same order."""

import pathlib

import numpy
import torch
from torch import nn
from torch.nn import functional

from microbatch import _core


class Sublayer(nn.Module):
    def __init__(self, name, width, outputs, projected):
        super().__init__()
        self.name = name
        self.add_module(name, nn.Linear(width, outputs))
        self.projection = nn.Linear(projected, width)

    def weights(self):
        linear = getattr(self, self.name)
        return [linear.weight, linear.bias, self.projection.weight, self.projection.bias]


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Sublayer("qkv", width, 3 * width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = Sublayer("expansion", width, 4 * width, 4 * width)

    def forward(self, x):
        weights = []
        for norm, sublayer in ((self.attention_norm, self.attention), (self.mlp_norm, self.mlp)):
            weights += [norm.weight, norm.bias, *sublayer.weights()]
        return _core.gpt2_block(x, weights, self.heads, 1e-5, False, None)


class Gpt(nn.Module):
    def __init__(self, layers=4, heads=4, width=128, length=64, vocabulary=256):
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def hidden(self, tokens):
        x = self.token_embedding(tokens) + self.position_embedding.weight.narrow(0, 0, tokens.shape[1])
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def loss(model, micro):
    tokens, targets = micro
    logits = functional.linear(model.hidden(tokens), model.token_embedding.weight)
    rows = functional.log_softmax(logits.reshape(targets.numel(), -1), 1)
    return functional.nll_loss(rows, targets.reshape(-1), reduction="sum"), targets.numel()


class Windows:
    """Consecutive windows of the bytes of a file, of which the last tenth is held out, as the command reads text."""

    def __init__(self, path, length=64):
        data = numpy.frombuffer(pathlib.Path(path).read_bytes(), dtype=numpy.uint8)
        self.tokens, self.length = torch.from_numpy(data[: len(data) - len(data) // 10].astype(numpy.int64)), length

    def __len__(self):
        return (len(self.tokens) - 1) // self.length

    def __getitem__(self, i):
        window = self.tokens[i * self.length : (i + 1) * self.length + 1]
        return window[:-1], window[1:]
