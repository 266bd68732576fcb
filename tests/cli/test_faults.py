"""Faults during a run: data that changes, a full disk, a clock that jumps."""

import json
import os
import re
import resource
import signal
import subprocess

import pytest

from conftest import COMMAND, FILES, TEXT, Result, ended, lines_of, words_of
from gate import HANG, wait_until
from resuming import assert_same, at_once, checkpoints_of
from test_resume import event_files, events_of

LONG = {"steps": "30M", "micro_batch": 3, "schedule": "constant", "dropout": 0.1}


@pytest.fixture
def tokens(run, data):
    """A file of tokens of this test's own: two pages and most of a third, of which the last tenth is held out."""
    file = run.folder / "own.bin"
    file.write_bytes(data.tokens.read_bytes()[:12_000])
    return file


# Data

@pytest.mark.parametrize("size", [0, 4096, 4196, 8300],
                         ids=["to nothing", "to a page", "within a page", "within its last page"])
def test_data_that_shrinks_while_it_is_read_ends_the_run_with_what_was_done(run, tokens, size):
    whole = tokens.read_bytes()
    process = run.start("train", data=tokens, **LONG)
    wait_until(lambda: lines_of(run) >= 3, process)
    os.truncate(tokens, size)
    out, err = ended(process)
    folder = run.folder / "run"
    assert process.returncode == 5, (process.returncode, err)
    assert err.startswith("microbatch: ") and "own.bin" in err and len(err.splitlines()) == 1
    done = lines_of(run)
    assert done >= 3 and checkpoints_of(folder)[-1].name.split("-")[1] == f"{done:08}"
    # With the original data it resumes, and ends as if nothing had happened.
    tokens.write_bytes(whole)
    resumed = run("train", "--run", "run", "--resume", "--steps", done + 5, "--json").ok()
    assert resumed.document["resumed_from"] == done
    assert_same(resumed, run.text("train", run="reference", data=tokens, **LONG | {"steps": done + 5}).ok())


def test_data_that_shrank_is_refused_at_resume(run, tokens):
    run.text("train", data=tokens).ok()
    os.truncate(tokens, 6000)
    run("train", "--run", "run", "--resume", "--steps", "4").refused(2, "data", "own.bin", "--resume-changed")


def test_data_that_is_deleted_stays_available_to_the_run(run, gate, tokens):
    reference = run.text("train", run="reference", data=tokens, **LONG | {"steps": 300}).ok()
    process = run.start_closed("train", gate, lines=3, data=tokens, **LONG | {"steps": 300})
    tokens.unlink()
    gate.open()
    _, err = ended(process)
    assert process.returncode == 0, err
    assert_same(Result(0, "", "", run.folder / "run"), reference)


# The log on a full disk

IGNORING = {"preexec_fn": lambda: signal.signal(signal.SIGXFSZ, signal.SIG_IGN), "stderr": subprocess.STDOUT}


def limit(process, size):
    """From now on, limits the size of files of the process, as on a full disk."""
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.mark.parametrize("spare", [0, 100], ids=["at once", "in the midst of a line"])
def test_a_full_disk_for_the_log_is_a_warning_and_missing_lines_are_written_later(run, gate, spare):
    # No checkpoints meanwhile: they could not be written either.
    flags = LONG | {"steps": 400, "checkpoint_every": "0 steps"}
    passes = 3  # a step
    with open(run.folder / "said", "w+") as said:
        process = run.start_closed("train", gate, lines=20, options=IGNORING | {"stdout": said}, **flags)
        limit(process, (run.folder / "run" / "metrics.jsonl").stat().st_size + 500 + spare)
        gate.close()
        gate.pass_on(40 * passes, process)
        full = lines_of(run)
        told = (run.folder / "said").read_text()
        assert full < 60 and re.search("warning.*metrics.jsonl", told)
        gate.pass_on(10 * passes, process)
        assert lines_of(run) == full
        limit(process, resource.RLIM_INFINITY)
        gate.pass_on(passes, process)
        assert lines_of(run) == 71
        gate.open()
        assert process.wait(HANG) == 0
    warnings = [line for line in (run.folder / "said").read_text().splitlines() if "warning" in line]
    assert any("metrics.jsonl" in line and "File too large" in line for line in warnings), warnings
    assert len(warnings) <= 6  # not one a step
    result = Result(0, "", "", run.folder / "run")
    assert_same(result, run.text("train", run="reference", **flags).ok())
    assert result.files == FILES
    (events,) = event_files(result.folder)
    assert [event[2] for event in events_of(events) if b"train/loss" in event.get(5, b"")] == list(range(1, 401))


def test_an_incomplete_log_is_completed_by_resuming(run, gate):
    flags = LONG | {"steps": 100, "checkpoint_every": "0 steps"}
    process = run.start_closed("train", gate, lines=20, options=IGNORING, **flags)
    limit(process, (run.folder / "run" / "metrics.jsonl").stat().st_size + 100)
    gate.open()
    out, _ = ended(process)
    assert "warning" in out and process.returncode != -signal.SIGXFSZ
    result = run("train", "--run", "run", "--resume", *words_of({"data": run.data.text} | TEXT | flags)).ok()
    assert_same(result, run.text("train", run="reference", **flags).ok())


def test_a_log_whose_last_lines_cannot_be_written_is_an_error_of_its_own(run, gate):
    # The log of so many steps is larger than every other file but that of the events, which only warns.
    flags = LONG | {"steps": 600, "width": 8, "no_checkpoints": True}
    process = run.start_closed("train", gate, lines=599, options=IGNORING | {"stderr": subprocess.PIPE}, **flags)
    limit(process, (run.folder / "run" / "metrics.jsonl").stat().st_size + 10)
    gate.open()
    out, err = ended(process)
    assert re.search("warning.*metrics.jsonl", out)
    assert process.returncode == 6 and "metrics.jsonl: File too large; its last lines are lost" in err, err
    assert (run.folder / "run" / "model.safetensors").exists() and lines_of(run) == 599


# The clock

JUMPS = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>
/* A year forth, two years back, three years forth: every look at the clock is far from the one before. */
static time_t jump(void) {
    static int looks;
    int look = __atomic_add_fetch(&looks, 1, __ATOMIC_RELAXED) % 8;
    return (look % 2 ? 1 : -1) * (time_t)(look + 1) * 365 * 24 * 3600;
}
int clock_gettime(clockid_t clock, struct timespec* now) {
    static int (*real)(clockid_t, struct timespec*);
    if (!real) real = (int (*)(clockid_t, struct timespec*))dlsym(RTLD_NEXT, "clock_gettime");
    int code = real(clock, now);
    if (code == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += jump();
    return code;
}
int gettimeofday(struct timeval* restrict now, void* restrict zone) {
    struct timespec exact;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &exact);
    now->tv_sec = exact.tv_sec;
    now->tv_usec = exact.tv_nsec / 1000;
    return 0;
}
time_t time(time_t* place) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (place) *place = exact.tv_sec;
    return exact.tv_sec;
}
"""


@pytest.fixture(scope="module")
def jumping(tmp_path_factory):
    """The environment in which the clock jumps by years."""
    folder = tmp_path_factory.mktemp("clock")
    (folder / "jumps.c").write_text(JUMPS)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", folder / "jumps.so", folder / "jumps.c", "-ldl"], check=True)
    return os.environ | {"LD_PRELOAD": str(folder / "jumps.so")}


def test_a_clock_that_jumps_changes_nothing(run, jumping):
    flags = {"micro_batch": 3, "dropout": 0.1, "noise_every": 3, "checkpoint_every": "5 steps", "schedule": "constant"}
    flags["memory"] = at_once(run, "text", micro_batch=3, dropout=0.1)
    reference = run.text("train", run="reference", steps=60, **flags).ok()
    for count in (30, 60):
        words = {"data": run.data.text} | TEXT | flags | {"run": "run", "steps": count, "resume": True}
        result = run("train", *words_of(words), env=jumping).ok()
    assert_same(result, reference)
    assert [entry.name for entry in checkpoints_of(result.folder)] == [f"step-{step:08}" for step in (50, 55, 60)]
    for line in result.metrics:
        assert 0 < line["update_seconds"] <= line["step_seconds"] < 60
    # It did jump.
    times = [event[1] for file in event_files(result.folder) for event in events_of(file)]
    year = 365 * 24 * 3600
    assert sum(later < earlier - year for earlier, later in zip(times, times[1:])) > 3
    assert len(event_files(result.folder)) == 2


def test_a_clock_that_jumps_delays_no_interruption(run, jumping):
    words = words_of({"data": run.data.text} | TEXT | LONG | {"run": "run", "checkpoint_every": "10 steps"})
    process = subprocess.Popen([COMMAND, "train", *words], cwd=run.folder, stdin=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=jumping)
    wait_until(lambda: lines_of(run) >= 12, process)
    process.send_signal(signal.SIGTERM)
    _, err = ended(process)
    assert process.returncode == 130, err
    steps = [json.loads(line)["step"] for line in (run.folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert checkpoints_of(run.folder / "run")[-1].name.split("-")[1] == f"{len(steps):08}"
