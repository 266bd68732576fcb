"""The `microbatch` command of the package: beside it, not in it, so that `--help` does not wait for torch's import."""

import os
import sys


def main() -> None:
    command = os.path.join(os.path.dirname(__file__), "microbatch", "bin", "microbatch")  # pathlib takes 7 ms to import
    os.execv(command, [command, *sys.argv[1:]])
