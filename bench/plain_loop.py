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

from peers.model import Gpt


def main():
    meter = ctypes.CDLL(sys.argv[1])
    meter.microbatch_peak.restype = ctypes.c_longlong
    meter.microbatch_install()
    torch.manual_seed(1)
    model = Gpt(layers=12, heads=12, width=768, length=1024, vocabulary=50257)
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
