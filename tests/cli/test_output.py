"""What the user sees: help, drawing on a terminal, plain lines in a pipe, one document for a program, the schedules."""

import fcntl
import math
import os
import pathlib
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import termios
import tomllib

import pytest

from conftest import COMMAND, FILES, OF_COMMAND, ROOT, TEXT, Result, ended, lines_of, words_of
from gate import HANG, wait_until

JOB = ["data", "model", "layers", "heads", "kv-heads", "width", "inner", "length", "norm", "dropout", "batch",
       "micro-batch", "recompute", "batch-norm", "device", "memory",
       "optimizer", "lr", "lr-rule", "reference-batch", "clip", "weight-decay", "momentum", "nesterov", "schedule",
       "warmup", "final-lr", "decay", "power", "seed", "threads", "config", "json", "help"]
LENGTH = ["steps", "samples", "tokens"]
FLAGS = {"train": JOB + LENGTH + ["run", "no-verify", "no-guard", "restores", "noise-every", "batch-schedule", "quiet", "processes",
                                 "shard-optimizer", "invariant", "grain", "checkpoint-every", "keep", "keep-every", "no-checkpoints", "resume",
                                 "resume-changed"],
         "plan": JOB + ["run"], "compare": JOB + LENGTH + ["run", "batches", "seeds"], "advise": JOB + LENGTH + ["check"],
         "report": ["help"], "doctor": ["json", "help"]}


# Help

def test_the_version_is_one_line(run):
    assert re.fullmatch(r"microbatch \d+\.\d+\.\d+\n", run("--version").ok().stdout)


@pytest.mark.parametrize("command", FLAGS)
def test_help_explains_every_flag(run, command):
    for word in ("--help", "-h"):
        result = run(command, word).ok()
        assert result.stderr == ""
        told = dict(re.findall(r"^ +(?:-\w,)?--([\w-]+) (.*)$", result.stdout, re.MULTILINE))
        assert set(told) == set(FLAGS[command])
        assert [flag for flag, text in told.items() if len(text.split("  ")[-1].split()) < 3] == []
        assert max(map(len, result.stdout.splitlines())) < 200


def test_help_names_commands_exit_codes_and_an_example(run):
    text = run("--help").ok().stdout
    assert [name for name in FLAGS if not re.search(rf"^  {name} +[A-Z]", text, re.MULTILINE)] == []
    codes = dict(re.findall(r"^  (\d+) (\w+ ?\w*)", text, re.MULTILINE))
    assert list(codes) == ["0", "2", "3", "4", "5", "6", "7", "130"]
    assert (codes["3"], codes["4"], codes["5"], codes["6"]) == ("does not", "stopped by", "bad data", "a file")
    assert "microbatch train --data" in text


def told_defaults(text):
    """{option: default} of a --help, its lines joined again."""
    told = re.split(r"^  (?:-\w,)?--([\w-]+)", text, flags=re.MULTILINE)
    found = {name: re.search(r"\(default: (.*?)\)", " ".join(help_.split())) for name, help_ in zip(told[1::2], told[2::2])}
    return {name: match[1] for name, match in found.items() if match}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_defaults_in_help_are_those_of_a_run(run, optimizer):
    told = told_defaults(run("train", "--help").ok().stdout)
    run("train", "--data", run.data.text, "--steps", "1", "--run", "run", "--optimizer", optimizer, "--memory", "1GiB",
        "--micro-batch", "16", "--no-verify").ok()
    written = tomllib.loads((run.folder / "run" / "config.toml").read_text())
    expected = {name: str(written[name]) for name in ("batch", "clip", "schedule", "warmup", "restores", "noise-every",
                                                      "checkpoint-every", "keep", "seed", "final-lr")}
    assert {name: told[name] for name in expected} == expected
    for name in ("lr", "weight-decay"):
        assert f"{written[name]} for {optimizer}" in told[name]
    if optimizer == "sgd":
        assert told["momentum"] == str(written["momentum"])


def test_every_key_that_a_run_records_is_an_option(run):
    run.text("train").ok()
    assert set(tomllib.loads((run.folder / "run" / "config.toml").read_text())) <= set(FLAGS["train"])


def test_help_says_that_the_head_of_a_gpt_and_of_a_llama_is_its_embedding(run):
    text = " ".join(run("train", "--help").ok().stdout.split())
    assert "The output head of a gpt or llama is its token embedding (tied weights)" in text


def test_help_says_how_long_a_run_is_by_default(run):
    text = run("train", "--help").ok().stdout
    assert re.search(r"default.*100 steps|100 steps.*default", text.split("How long")[1])


# Lines in a pipe

def test_a_pipe_gets_plain_lines(run):
    result = run.text("train", steps=20).ok()
    assert result.stderr == "" and "\r" not in result.stdout and "\x1b" not in result.stdout
    progress = [line for line in result.stdout.splitlines() if re.match(r" *\d+ %  step", line)]
    assert progress
    for line in progress:
        assert re.search(r"loss \d+\.\d+ .* [\d,]+ tokens/s .*peak [\d.]+ of 64\.0 MiB .*\d:\d\d left", line)


def test_images_are_counted_as_images(run):
    assert "images/s" in run.images("train").ok().stdout


def test_a_summary_is_at_the_end(run):
    result = run.text("train", steps=3, micro_batch=8).ok()
    done, loss, memory, time_, written = result.stdout.splitlines()[-5:]
    assert re.match(r"done +3 steps, 24 samples in .* tokens/s", done)
    first, last = (f"{result.column('loss')[at]:.4f}" for at in (0, -1))
    assert re.match(rf"loss +{first} at the first step, {last} at the last, [\d.]+ held out", loss)
    assert re.match(r"memory +peak .* measured, .* predicted .*, budget 64 MiB", memory)
    assert re.match(r"time +[\d.]+ s per step measured, [\d.]+ s predicted \([+-][\d.]+ %\)$", time_)
    assert written.split()[1] == "run:" and "metrics.jsonl" in written


def test_the_first_lines_reach_a_pipe_before_the_first_step_ends(run, gate):
    process = run.start_closed("train", gate)
    ready, _, _ = select.select([process.stdout], [], [], HANG)
    assert ready and lines_of(run) == 0 and process.stdout.readline().startswith("model ")


# Streams that cannot be written

def command(name, run, **flags):
    return [COMMAND, name, *words_of({"data": run.data.text} | TEXT | OF_COMMAND[name] | flags)]


CASES = [("plan", {}, 0), ("plan", {"json": True}, 0), ("plan", {"data": "nosuch"}, 5), ("plan", {"batch": 0}, 2),
         ("plan", {"memory": "5KiB"}, 3), ("train", {"json": True}, 0), ("train", {}, 0),
         ("compare", {"samples": 16, "seeds": 1}, 0), ("advise", {}, 0)]


@pytest.mark.parametrize("name, flags, code", CASES, ids=[f"{name} {flags}" for name, flags, _ in CASES])
def test_a_full_stdout_or_stderr_changes_no_exit_code(run, name, flags, code):
    with open("/dev/full", "w") as full:
        for streams in ({"stdout": full}, {"stderr": full}, {"stdout": full, "stderr": full}):
            shutil.rmtree(run.folder / "run", ignore_errors=True)
            streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
            done = subprocess.run(command(name, run, **flags), cwd=run.folder, timeout=HANG, **streams)
            assert done.returncode == code, (streams, done)


@pytest.mark.parametrize("words, code", [(["--help"], 0), (["train", "--help"], 0), (["--version"], 0), (["doctor"], 0),
                                         (["bogus"], 2), (["report", "nosuch"], 5)], ids=lambda words: str(words))
def test_a_full_stream_changes_no_exit_code_of_the_other_commands(run, words, code):
    with open("/dev/full", "w") as full:
        assert run(*words, stdout=full, stderr=full, capture_output=False).returncode == code


@pytest.mark.parametrize("closed", [[1], [2], [0, 1, 2]], ids=str)
def test_a_closed_stream_changes_nothing_and_gets_no_file_of_the_run(run, closed):
    def close():
        for descriptor in closed:
            os.close(descriptor)

    done = subprocess.run(command("train", run, steps=3), cwd=run.folder, timeout=HANG, preexec_fn=close)
    assert done.returncode == 0
    result = Result(0, "", "", run.folder / "run")
    assert result.column("step") == [1, 2, 3] and result.files == FILES
    for file in ("config.toml", "metrics.jsonl", "summary.json"):
        text = (result.folder / file).read_text()
        assert "samples per step" not in text and "done   " not in text


def piped(run, **flags):
    """A long run whose reader has read one line and gone away."""
    process = subprocess.Popen(command("train", run, micro_batch=8, **flags), cwd=run.folder, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("model ")
    process.stdout.close()
    return process


def test_a_reader_that_goes_away_does_not_end_a_run(run):
    process = piped(run, steps=300)
    assert process.wait(HANG) == 0 and process.stderr.read() == ""
    result = Result(0, "", "", run.folder / "run")
    assert len(result.metrics) == 300 and "model.safetensors" in result.files


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_run_without_a_reader_can_be_interrupted_and_saves_a_checkpoint(run, sent):
    process = piped(run, steps="30M", schedule="constant")
    wait_until(lambda: lines_of(run) >= 3, process)
    process.send_signal(sent)
    assert process.wait(HANG) == 130
    assert len(list((run.folder / "run" / "checkpoints").iterdir())) == 1


def test_an_interrupt_that_ends_tee_first_leaves_a_checkpoint(run):
    """microbatch train ... | tee log, and Ctrl-C, which goes to both."""
    words = command("train", run, steps="30M", micro_batch=8, checkpoint_every="0 steps")
    shell = subprocess.Popen(["bash", "-c", 'trap : INT; "$@" | tee log; echo ${PIPESTATUS[0]} > code', "bash", *words],
                             cwd=run.folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                             start_new_session=True)
    run.started.append(shell)
    wait_until(lambda: lines_of(run) >= 3, shell)
    children = pathlib.Path(f"/proc/{shell.pid}/task/{shell.pid}/children").read_text().split()
    (tee,) = (int(child) for child in children if pathlib.Path(f"/proc/{child}/comm").read_text() == "tee\n")
    os.kill(tee, signal.SIGINT)
    wait_until(lambda: not pathlib.Path(f"/proc/{tee}").exists(), shell)
    steps = lines_of(run)
    wait_until(lambda: lines_of(run) > steps + 20, shell)
    os.killpg(shell.pid, signal.SIGINT)
    _, err = ended(shell)
    assert (run.folder / "code").read_text() == "130\n", err
    (checkpoint,) = (run.folder / "run" / "checkpoints").iterdir()
    assert checkpoint.name.split("-")[1] == f"{lines_of(run):08}"


def test_a_comparison_whose_reader_goes_away_ends_normally(run):
    process = subprocess.Popen(command("compare", run, samples=32, seeds=1), cwd=run.folder, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    process.stdout.close()
    process.stderr.close()
    assert process.wait(HANG) == 0


def test_everything_is_printed_through_one_function():
    forbidden = re.compile(r"fmt::print|std::(cout|cerr|clog|puts|f?printf|fwrite|fputs)\b|(?<![\w:.])(puts|f?printf)\(")
    sources = [file for file in (ROOT / "cli").rglob("*.[ch]*") if file.name != "output.cpp"]
    assert len(sources) > 30 and [file for file in sources if forbidden.search(file.read_text())] == []


# A terminal

@pytest.fixture
def terminal(run, gate):
    """Train on a terminal of so many columns: the exit code and what came."""
    gate.pace()

    def train(columns, **flags):
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        words = words_of({"data": run.data.text} | TEXT | OF_COMMAND["train"] | flags)
        process = subprocess.Popen([COMMAND, "train", *words], cwd=run.folder, stdin=theirs, stdout=theirs,
                                   stderr=theirs, env=gate.environment)
        os.close(theirs)
        seen = b""
        try:
            while part := os.read(ours, 65536):
                seen += part
        except OSError:  # the other end is closed
            pass
        os.close(ours)
        return process.wait(HANG), seen.decode().replace("\r\n", "\n")

    return train


def drawn(seen):
    """What each redrawing of the progress line shows, without the codes."""
    return [re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", part.split("\n")[0]) for part in seen.split("\r")[1:]]


@pytest.mark.parametrize("columns", [40, 120])
def test_a_terminal_gets_one_line_that_is_redrawn(terminal, columns):
    code, seen = terminal(columns, steps=1500, micro_batch=8)
    assert code == 0
    shown = [text for text in drawn(seen) if "%" in text]
    assert len(shown) >= 3 and "100 %" in shown[-1]
    assert max(map(len, shown)) < columns
    # No scrolling: all trials are drawn in one line, and so is all progress.
    assert len([line for line in seen.split("\n") if "\r" in line and "measuring" not in line]) == 1
    assert len([line for line in seen.split("\n") if "measuring" in line]) == 1
    assert re.search(r"\ndone +1,500 steps", seen)


def test_a_terminal_of_80_columns_shows_loss_speed_peak_and_time_left(terminal):
    _, seen = terminal(80, steps=300, micro_batch=8)
    last = [text for text in drawn(seen) if "%" in text][-1]
    assert re.search(r"loss \d\.\d+.*tokens/s.*peak [\d.]+ .*\d:\d\d", last), last


def test_trials_are_drawn_within_a_narrow_terminal(terminal):
    shown = [text for text in drawn(terminal(40, micro_batch=8, recompute="always")[1]) if "measuring" in text]
    assert shown and max(map(len, shown)) < 40


def test_a_dumb_terminal_gets_no_codes(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in terminal(80, steps=30)[1]


# One document

@pytest.mark.parametrize("command", ["train", "compare", "plan"])
def test_json_is_one_document_and_the_rest_goes_to_the_other_stream(run, command):
    result = run.text(command, json=True).ok()
    assert result.stdout.startswith("{") and isinstance(result.document, dict)
    assert "\x1b" not in result.stderr and (result.stderr != "" or command == "plan")


def test_the_document_of_a_run_is_what_its_metrics_say(run):
    result = run.text("train", steps=3, json=True).ok()
    told, last = result.document, result.metrics[-1]
    assert [told[key] for key in ("samples", "tokens", "loss", "micro_batch")] == [
        last[key] for key in ("samples", "tokens", "loss", "micro_batch")]
    assert told["steps"] == 3 and told["first_loss"] == result.metrics[0]["loss"] and told["interrupted"] is False
    assert told["peak_bytes"] == max(result.column("peak_bytes")) <= told["budget_bytes"] == 64 * 2**20


def test_an_error_prints_no_document(run):
    run.text("plan", json=True, batch=0).refused(2, "--batch")


# The learning rate in the metrics is that of the schedule

def rates(run, **flags):
    return run.images("train", model="mlp", norm=None, lr=0.01, no_verify=True, **flags).ok().column("learning_rate")


@pytest.mark.parametrize("schedule, shape", [
    ("constant", lambda way: 1), ("linear", lambda way: 1 - way),
    ("cosine", lambda way: (1 + math.cos(math.pi * way)) / 2),
    ("polynomial", lambda way: (1 - way) ** 2), ("wsd", lambda way: 1 - max(0, (way * 5 - 1) / 4)),
])
def test_the_learning_rate_follows_the_schedule(run, schedule, shape):
    floor = 0 if schedule == "constant" else 0.001
    flags = {"decay": "3 steps"} if schedule == "wsd" else {}
    seen = rates(run, steps=8, schedule=schedule, warmup="3 steps", **({"final_lr": floor} if floor else {}), **flags)
    rest = [floor + (0.01 - floor) * shape(done / 5) for done in range(5)]
    assert seen == pytest.approx([0.01 / 3, 0.02 / 3, 0.01, *rest], rel=1e-12)


@pytest.mark.parametrize("warmup", ["4 steps", "32 samples", "32 tokens"])
def test_warmup_has_the_same_meaning_in_every_unit(run, warmup):
    assert rates(run, steps=6, schedule="constant", warmup=warmup) == pytest.approx(
        [0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01], rel=1e-12)


def test_a_schedule_in_samples_counts_the_smaller_last_batch(run):
    seen = rates(run, steps=None, samples=60, schedule="linear", warmup="20 samples")
    assert seen == pytest.approx([0.004, 0.008, 0.01, 0.009, 0.007, 0.005, 0.003, 0.001], rel=1e-12)
