"""The short version of tests/crash/growth: a run of many steps takes no more memory, files or threads than one of few."""

import os
import pathlib
import re
import subprocess

import pytest

HERE = pathlib.Path(__file__).resolve().parent
COMMAND = os.path.abspath(os.environ.get("MICROBATCH", HERE.parents[1] / "build" / "release" / "microbatch"))


# Takes memory and opens a file in every tenth write.
LEAK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
ssize_t write(int file, const void* text, size_t size) {
    static ssize_t (*real)(int, const void*, size_t);
    static int writes;
    if (!real) real = (ssize_t (*)(int, const void*, size_t))dlsym(RTLD_NEXT, "write");
    if (++writes % 10 == 0 && open("/dev/null", O_RDONLY) >= 0) memset(malloc(200000), 1, 200000);
    return real(file, text, size);
}
"""


def growth(*words, command=COMMAND):
    return subprocess.run([HERE / "growth", *words], capture_output=True, text=True, timeout=1500,
                          env=os.environ | {"MICROBATCH": str(command)})


@pytest.mark.parametrize("job", ["text", "images"])
def test_memory_file_descriptors_and_threads_do_not_grow(job):
    done = growth("--steps", "1500", "--from", "500", "--job", job)
    assert done.returncode == 0, done.stdout + done.stderr


def test_it_detects_growth(tmp_path):
    (tmp_path / "leak.c").write_text(LEAK)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", tmp_path / "leak.so", tmp_path / "leak.c", "-ldl"], check=True)
    leaking = tmp_path / "leaking"
    leaking.write_text(f'#!/bin/sh\nexec env LD_PRELOAD="{tmp_path}/leak.so:$LD_PRELOAD" {COMMAND} "$@"\n')
    leaking.chmod(0o755)
    done = growth("--steps", "1000", "--from", "300", command=leaking)
    grown = re.search(r"^resident memory ([+-][\d.]+) %, file descriptors ([+-]\d+)", done.stdout, re.MULTILINE)
    assert done.returncode == 1 and grown, done.stdout + done.stderr
    assert float(grown[1]) > 1 and int(grown[2]) > 0
