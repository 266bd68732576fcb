"""The `microbatch` command of the package: beside it, not in it, so that `--help` does not wait for torch's import."""

import os
import pathlib
import sys


def main() -> None:
    command = pathlib.Path(__file__).with_name("microbatch") / "bin" / "microbatch"
    os.execv(command, [os.fspath(command), *sys.argv[1:]])
