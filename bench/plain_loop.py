"""The loop that PyTorch users write, on GPT-2 124M: memory measured by the same allocator. Prints one line of JSON.

usage: plain_loop.py METER_LIBRARY
"""

import ctypes
import json
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.expansion, self.contraction = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        samples, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).split(width, dim=2)
        q, k, v = (t.view(samples, length, self.heads, width // self.heads).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.projection(y.transpose(1, 2).reshape(samples, length, width))
        return x + self.contraction(F.gelu(self.expansion(self.norm2(x)), approximate="tanh"))


class Gpt(nn.Module):
    def __init__(self, layers=12, heads=12, width=768, length=1024, vocabulary=50257):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens):
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def main():
    meter = ctypes.CDLL(sys.argv[1])
    meter.microbatch_peak.restype = ctypes.c_longlong
    meter.microbatch_install()
    torch.manual_seed(1)
    model = Gpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    accumulation_steps = 2
    tokens = torch.randint(50257, (accumulation_steps, 1, 1024))
    targets = torch.randint(50257, (accumulation_steps, 1, 1024))
    meter.microbatch_reset_peak()
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        for micro in range(accumulation_steps):
            logits = model(tokens[micro])
            loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets[micro].view(-1)) / accumulation_steps
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    parameters = 4 * sum(p.numel() for p in model.parameters())
    peak = meter.microbatch_peak()
    print(json.dumps({"parameter_bytes": parameters, "peak_bytes": peak, "activation_bytes": peak - 4 * parameters,
                      "step_seconds": statistics.median(seconds)}))


main()
