"""The short version of tests/crash/kill: a run that is killed at random instants and resumed equals the uninterrupted one."""

import os
import pathlib
import re
import subprocess

HERE = pathlib.Path(__file__).resolve().parent
COMMAND = os.path.abspath(os.environ.get("MICROBATCH", HERE.parents[1] / "build" / "release" / "microbatch"))


def kill(*words, command=COMMAND):
    return subprocess.run([HERE / "kill", *words], capture_output=True, text=True, timeout=1500,
                          env=os.environ | {"MICROBATCH": str(command)})


def test_killed_and_resumed_runs_end_like_uninterrupted_ones():
    jobs = ["gpt, dropout, ragged", "resnet, batch norm, sgd", "guard, tight memory", "many micro-batches"]
    done = kill("--kills", "12", "--seed", "1", *(word for job in jobs for word in ("--job", job)))
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^all +\d+ +12 ", done.stdout, re.MULTILINE) and "\nall the same in " in done.stdout


def test_it_detects_a_difference(tmp_path):
    # A command that trains at another rate where it is to resume.
    other = tmp_path / "other"
    other.write_text(f'#!/bin/sh\ncase " $* " in *" --resume "*) set -- "$@" --lr 0.002 ;; esac\nexec {COMMAND} "$@"\n')
    other.chmod(0o755)
    done = kill("--kills", "1", "--seed", "1", "--job", "gpt, dropout, ragged", command=other)
    assert done.returncode == 1 and "DIFFERS" in done.stdout, done.stdout + done.stderr
    kept = re.search(r"\(in (/\S*/microbatch-kill-[^/]+)", done.stdout)[1]
    subprocess.run(["rm", "-r", "--", kept], check=True)
