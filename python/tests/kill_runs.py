"""Kills a run again and again, and resumes it to its end: `kill_runs.py FOLDER STEPS KILLS`.

Forks a process for every attempt, so that torch is imported once; a process is killed some time after its first step.
"""

import os
import pathlib
import random
import signal
import sys
import time

import run_to_kill
import torch

import microbatch as mb


def attempt(folder, steps):
    """The process id of a run in a process of its own."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            run_to_kill.train(folder, steps)
            code = 0
        finally:
            os._exit(code)
    return child


def length(folder):
    log = pathlib.Path(folder) / "metrics.jsonl"
    return log.stat().st_size if log.exists() else 0


def end_of(child, folder, killed_after):
    """The status of the child's end; it is killed so many seconds after its first step."""
    before = length(folder)
    while length(folder) == before:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.002)
    time.sleep(killed_after)
    os.kill(child, signal.SIGKILL)  # also where it has just ended by itself
    return os.waitpid(child, 0)[1]


def main(folder, steps, kills):
    torch.set_num_threads(1)
    mb.AdamW(run_to_kill.build().parameters())  # torch imports its compiler with the first optimizer: seconds
    clock = random.Random(5)
    for killed in range(kills):
        status = end_of(attempt(folder, steps), folder, clock.uniform(0.0, 0.03))
        if not os.WIFSIGNALED(status):
            print(f"the run ended by itself after {killed} kills")
            return 1
    print(f"{kills} kills")
    return os.waitstatus_to_exitcode(os.waitpid(attempt(folder, steps), 0)[1])


sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
