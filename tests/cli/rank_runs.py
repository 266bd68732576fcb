"""Runs of several processes, for tests."""

import pathlib
import subprocess
import time

from conftest import HANG

LOST = 7
RUN = {"batch": 7, "micro_batch": 2, "optimizer": "sgd", "schedule": "constant"}


def close(one, other, relative):
    return len(one) == len(other) > 0 and all(abs(a - b) <= relative * abs(a) for a, b in zip(one, other))


def rank_of(process):
    words = pathlib.Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    return int(next(word for word in words if word.startswith(b"RANK="))[5:])


def ranks_of(launcher):
    found = subprocess.run(["pgrep", "-P", str(launcher)], capture_output=True, text=True, check=True).stdout
    return {rank_of(process): int(process) for process in found.split()}


def has_ended(process):
    try:
        return " Z " in pathlib.Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return True


def start_three(run, **flags):
    process = run.start("train", steps=100_000, processes=3, batch=12, micro_batch=2, checkpoint_every="20 steps", **flags)
    log = run.folder / "run" / "metrics.jsonl"
    deadline = time.monotonic() + HANG
    while not log.exists() or log.read_bytes().count(b"\n") < 30:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    return process, ranks_of(process.pid)
