"""`doctor` reports on the machine, and finds no problem on the machine of the tests."""

import os
import re

import pytest

NAMES = ["microbatch", "torch", "threads", "memory", "memory budget", "accumulated gradients", "sample text",
         "sample images"]


@pytest.fixture(scope="module")
def document(shared_run):
    return shared_run("doctor", "--json").ok().document


def test_every_finding_has_a_value_and_a_verdict(document):
    assert [name for name in NAMES if name not in document] == []
    assert all(isinstance(each["value"], str) and each["value"] and isinstance(each["good"], bool)
               for each in document.values())


def test_it_works_on_this_machine(document):
    assert [name for name in NAMES if not document[name]["good"]] == []


def test_the_version_is_that_of_the_command(run, document):
    assert run("--version").ok().stdout.split() == ["microbatch", document["microbatch"]["value"]]


def test_cores_and_memory_are_those_of_the_machine(document):
    assert document["threads"]["value"].endswith(f"of {len(os.sched_getaffinity(0))} cores")
    with open("/proc/meminfo") as file:
        total = int(next(line for line in file if line.startswith("MemTotal")).split()[1]) / 2**20
    free, of = map(float, re.findall(r"([\d.]+) GiB", document["memory"]["value"]))
    assert 0 < free <= of <= total * 1.01


def test_the_plain_form_has_a_line_for_each(run, document):
    lines = run("doctor").ok().stdout.splitlines()
    assert len(lines) == len(document)
    assert all(re.match(r"(ok|!!)  \w", line) for line in lines)
    assert [name for name in document if not any(line[4:].startswith(name) for line in lines)] == []


def test_it_writes_nothing(run):
    run("doctor").ok()
    assert list(run.folder.iterdir()) == []


def test_a_broken_machine_gives_exit_code_2(run):
    text = " ".join(run("doctor", "--help").ok().stdout.split())
    assert "Exit code 2 if Microbatch does not work on this machine" in text
