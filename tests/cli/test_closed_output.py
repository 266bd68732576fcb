"""Output that nobody reads, or that cannot be written: it neither ends a run nor changes the exit code."""

import os
import pathlib
import signal
import subprocess
import time

import pytest

from conftest import COMMAND, FILES, TEXT, words_of
from resuming import checkpoints_of
from test_interrupt import lines_of, wait_for


def train_words(run, **flags):
    return ["train", *words_of({"data": run.data.text} | TEXT | {"run": "run", "steps": 4, "micro_batch": 8} | flags)]


@pytest.mark.parametrize("how", ["full", "closed"])
@pytest.mark.parametrize("descriptors", [[1], [2], [1, 2]], ids=["stdout", "stderr", "both"])
def test_a_full_or_closed_output_leaves_the_exit_code_as_it_is(run, how, descriptors):
    def take_away():
        for descriptor in descriptors:
            if how == "full":
                os.dup2(os.open("/dev/full", os.O_WRONLY), descriptor)
            else:
                os.close(descriptor)

    def code_of(*words):
        return run(*words, preexec_fn=take_away, capture_output=False, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL, timeout=60).returncode

    assert code_of("--help") == 0 and code_of("train", "--help") == 0
    assert code_of("plan", "--data", "nosuch") == 5
    assert code_of("plan", "--no-such-flag") == 2
    assert code_of("plan", "--data", run.data.text, *words_of(TEXT | {"memory": "100KiB"})) == 3
    assert code_of(*train_words(run)) == 0
    assert run.in_folder("run", ["report", "run"]).ok().files == FILES


def test_a_reader_that_goes_away_does_not_end_the_run(run):
    """microbatch train ... | head -1"""
    done = subprocess.run(["bash", "-c", '"$@" | head -1; echo ${PIPESTATUS[0]}', "bash", COMMAND,
                           *map(str, train_words(run, steps=200))],
                          cwd=run.folder, capture_output=True, text=True, timeout=60)
    first, code = done.stdout.splitlines()
    assert first.startswith("model ") and code == "0" and done.stderr == ""
    assert lines_of(run) == 200 and checkpoints_of(run.folder / "run")[-1].name == "step-00000200"


def test_an_interrupt_that_ends_tee_first_leaves_a_checkpoint(run):
    """microbatch train ... | tee log, and Ctrl-C, which goes to both."""
    shell = subprocess.Popen(["bash", "-c", 'trap : INT; "$@" | tee log; echo ${PIPESTATUS[0]} > code', "bash", COMMAND,
                              *map(str, train_words(run, steps="30M", checkpoint_every="0 steps"))],
                             cwd=run.folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                             start_new_session=True)
    wait_for(lambda: lines_of(run) >= 3, shell)
    children = pathlib.Path(f"/proc/{shell.pid}/task/{shell.pid}/children").read_text().split()
    (tee,) = (int(child) for child in children if pathlib.Path(f"/proc/{child}/comm").read_text() == "tee\n")
    os.kill(tee, signal.SIGINT)
    wait_for(lambda: not pathlib.Path(f"/proc/{tee}/fd").exists() or not os.listdir(f"/proc/{tee}/fd"), shell)
    steps = lines_of(run)
    wait_for(lambda: lines_of(run) > steps + 20, shell)  # the run goes on without it
    os.killpg(shell.pid, signal.SIGINT)
    _, err = shell.communicate(timeout=60)
    assert (run.folder / "code").read_text() == "130\n", err
    (checkpoint,) = checkpoints_of(run.folder / "run")
    assert checkpoint.name.split("-")[1] == f"{lines_of(run):08}"


def test_a_pipe_that_is_closed_while_it_trains_does_not_end_the_run(run):
    process = run.start("train", steps=600, micro_batch=8)
    process.stdout.readline()
    process.stdout.close()
    process.stderr.close()
    assert process.wait(60) == 0 and lines_of(run) == 600
