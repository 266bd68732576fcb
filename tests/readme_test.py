"""The content of the README runs: its commands here, its C++ as examples/readme.cpp."""

import os
import pathlib
import re
import shlex
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
COMMAND = os.path.abspath(os.environ.get("MICROBATCH", ROOT / "build" / "release" / "microbatch"))


def block(language):
    return re.search(rf"```{language}\n(.*?)```", README, re.DOTALL).group(1)


def test_the_cpp_example_is_compiled_and_run():
    source = (ROOT / "examples" / "readme.cpp").read_text()
    compiled = re.search(r"// README begins\n(.*?) *// README ends", source, re.DOTALL).group(1)
    assert block("cpp") == compiled
    assert len(block("cpp").splitlines()) <= 15


@pytest.mark.parametrize("line", block("sh").splitlines())
def test_the_commands_work_as_written(line, tmp_path):
    words = shlex.split(line)
    assert words[0] == "microbatch"
    result = subprocess.run([COMMAND, *words[1:]], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


def test_the_table_has_its_three_strategies():
    for strategy in ("small batch", "accumulated", "native"):
        assert len(re.findall(rf"^{strategy} +\d+ ", README, re.MULTILINE)) == 2


def test_every_file_that_the_readme_links_to_exists():
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links and not [link for link in links if not (ROOT / link).exists()]


def test_the_make_targets_that_the_readme_names_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {first or second for first, second in re.findall(r"^make ([a-z]+)|`make ([a-z]+)", README, re.MULTILINE)}
    assert {"demo", "test", "build"} <= named <= targets
