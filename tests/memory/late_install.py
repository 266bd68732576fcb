"""The budget allocator installed after torch and oneDNN have allocated: late_install.py LIBRARY."""
import ctypes
import gc
import sys

import torch

torch.manual_seed(1)
torch.set_num_threads(1)
net = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 16, 3), torch.nn.ReLU(),
                          torch.nn.Flatten(), torch.nn.Linear(16 * 28 * 28, 10))
optimizer = torch.optim.AdamW(net.parameters())
images, labels = torch.rand(16, 3, 32, 32), torch.randint(10, (16,))


def step():
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(net(images), labels).backward()
    optimizer.step()


step()
memory = ctypes.CDLL(sys.argv[1])
memory.live.restype = memory.peak.restype = ctypes.c_int64
memory.set_budget.argtypes = [ctypes.c_int64]
memory.install()
assert memory.live() == 0

held = torch.empty(1_000_003, dtype=torch.uint8)
assert memory.live() == memory.peak() == 1_000_003
del held
assert memory.live() == 0

for _ in range(3):
    step()
gc.collect()
after, peaks = memory.live(), []
for _ in range(3):
    memory.reset_peak()
    step()
    peaks.append(memory.peak())
gradients = sum(p.numel() * 4 for p in net.parameters())
assert gradients <= memory.live() <= after + 1000, (gradients, memory.live(), after)
assert peaks[0] == peaks[1] == peaks[2] > after + 16 * 16 * 30 * 30 * 4, peaks

memory.set_budget(memory.live() + 1_000_000)
try:
    step()
except torch.OutOfMemoryError as error:
    assert 'memory budget' in str(error), error
else:
    raise AssertionError('no torch.OutOfMemoryError')
memory.set_budget(1 << 40)
step()
