"""What every peer trains and how it is timed; the same as speed_case does.

usage of a peer: PEER MODEL BATCH MICRO_BATCH STEPS THREADS
"""

import gzip
import json
import pathlib
import sys
import time

import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from model import Gpt, Llama, ResNet

LANGUAGE_MODELS = {
    "gpt-tiny": dict(layers=4, heads=4, width=128, length=64, vocabulary=256),
    "gpt-small": dict(layers=6, heads=6, width=384, length=256, vocabulary=256),
    "gpt2": dict(layers=12, heads=12, width=768, length=1024, vocabulary=50257),
    "llama-15m": dict(layers=9, heads=6, kv_heads=3, width=384, inner=1024, length=256, vocabulary=256),
}
WEIGHT_DECAY, CLIP_NORM, WARM_UP = 0.1, 1.0, 1


class Windows(Dataset):
    def __init__(self, tokens, length):
        self.tokens, self.length = tokens, length

    def __len__(self):
        return (len(self.tokens) - 1) // self.length

    def __getitem__(self, index):
        window = self.tokens[index * self.length:(index + 1) * self.length + 1].long()
        return window[:-1], window[1:]


def read_text(folder):
    files = sorted(p for p in pathlib.Path(folder).rglob("*")
                   if p.is_file() and not p.is_symlink() and not p.name.startswith("."))
    contents = [file.read_bytes() for file in files]
    text = b"".join(content for content in contents if b"\0" not in content[:8192])
    return torch.frombuffer(bytearray(text[:len(text) - len(text) // 10]), dtype=torch.uint8)


def read_idx(name):
    path = pathlib.Path("/usr/share/datasets/fashion-mnist") / name
    content = path.read_bytes() if path.exists() else gzip.decompress(path.with_name(name + ".gz").read_bytes())
    dimensions = content[3]
    shape = [int.from_bytes(content[4 + 4 * i:8 + 4 * i], "big") for i in range(dimensions)]
    return torch.frombuffer(bytearray(content[4 + 4 * dimensions:]), dtype=torch.uint8).view(shape)


def fashion_mnist():
    images, labels = read_idx("train-images-idx3-ubyte"), read_idx("train-labels-idx1-ubyte")
    images = images.float().unsqueeze(1) / 255
    return TensorDataset((images - images.mean()) / images.std(), labels.long())


class Task:
    def __init__(self, words):
        self.name = words[0]
        self.batch, self.micro_batch, self.steps, self.threads = map(int, words[1:])
        self.accumulation_steps = self.batch // self.micro_batch
        self.optimizer_steps = WARM_UP + self.steps
        self.learning_rate = 3e-4 if self.name == "gpt2" else 1e-3
        self.losses, self.ends = [], []
        torch.set_num_threads(self.threads)
        torch.manual_seed(1)

    def model(self):
        kind = Llama if self.name.startswith("llama") else Gpt
        model = ResNet() if self.name == "resnet" else kind(**LANGUAGE_MODELS[self.name])
        self.parameters = sum(p.numel() for p in model.parameters())
        return model

    def dataset(self):
        if self.name == "resnet":
            return fashion_mnist()
        sizes = LANGUAGE_MODELS[self.name]
        if self.name == "gpt2":
            return Windows(torch.randint(sizes["vocabulary"], (1 << 18,)), sizes["length"])
        return Windows(read_text("/usr/share/games/fortunes"), sizes["length"])

    def loader(self):
        return DataLoader(self.dataset(), batch_size=self.micro_batch, shuffle=True, drop_last=True)

    def begin(self):
        self.ends.append(time.perf_counter())

    def note_loss(self, loss):
        """Mean loss of a micro-batch; its value is looked at when all is done."""
        self.losses.append(loss.detach())

    def end_step(self):
        """True once all steps are made. A step ends where the next one begins: fetching data is in the time."""
        self.ends.append(time.perf_counter())
        return len(self.ends) > self.optimizer_steps

    def report(self):
        seconds = [end - begin for begin, end in zip(self.ends, self.ends[1:])]
        count = self.accumulation_steps
        if len(seconds) != self.optimizer_steps or len(self.losses) != count * self.optimizer_steps:
            sys.exit(f"{len(seconds)} steps of {len(self.losses)} micro-batches: this is another training")
        mean = lambda losses: sum(loss.item() for loss in losses) / count
        print(json.dumps({
            "step_seconds": seconds[WARM_UP:], "first_loss": mean(self.losses[:count]),
            "last_loss": mean(self.losses[-count:]), "parameters": self.parameters, "all_seconds": sum(seconds)}))
