"""A folder of data that holds runs too, and data that is another when a run is resumed."""

import re
import shutil

import pytest

from conftest import TEXT, words_of


@pytest.fixture
def folder(run, data):
    """A folder of text; `train` in it, without --run, makes its runs in there too."""
    place = run.folder / "texts"
    place.mkdir()
    raw = data.text.read_bytes()
    (place / "first.txt").write_bytes(raw[:20_000])
    (place / "second.txt").write_bytes(raw[20_000:40_000])
    return place


def data_lines(out):
    """What is said of the data, a line each."""
    first, *lines = re.search(r"^data .*\n(?: {10}.*\n)*", out, re.MULTILINE)[0].splitlines()
    return [first.removeprefix("data").strip(), *(line.strip() for line in lines)]


def test_the_runs_in_the_data_folder_are_left_out_and_it_is_said(run, data, folder):
    there = type(run)(folder, data)
    words = ["train", *words_of(TEXT | {"data": ".", "micro_batch": 8, "steps": 3})]
    first, second, third = (there(*words).ok() for _ in range(3))
    runs = sorted(path.name for path in (folder / "runs").iterdir())
    assert len(runs) == 3
    losses = [re.search(r"^loss .*$", each.stdout, re.MULTILINE)[0] for each in (first, second, third)]
    assert losses[0] == losses[1] == losses[2]
    said = [data_lines(each.stdout) for each in (first, second, third)]
    assert said[0][:2] == said[1][:2] == said[2][:2] and "first.txt" in said[0][1] and "second.txt" in said[0][1]
    assert not any("left out" in line for line in said[0])
    assert any(line.startswith("left out 1 run folder") for line in said[1]), said[1]
    assert any(line.startswith("left out 2 run folders") for line in said[2]), said[2]
    # Nor do they make it other data.
    again = there("train", "--run", f"runs/{runs[0]}", "--resume", "--steps", "5").ok()
    assert "from step 3" in again.stdout


@pytest.mark.parametrize("change, words", [
    (lambda place: (place / "second.txt").write_bytes((place / "second.txt").read_bytes()[:-5000]),
     ["second.txt", "20,000", "15,000"]),
    (lambda place: (place / "second.txt").write_bytes((place / "second.txt").read_bytes().replace(b"e", b"a")),
     ["second.txt still has 20,000 bytes, but other ones"]),
    (lambda place: shutil.copy(place / "first.txt", place / "third.txt"), ["third.txt"]),
    (lambda place: (place / "second.txt").unlink(), ["second.txt"]),
], ids=["a shorter file", "another content", "one more file", "a file less"])
def test_how_the_data_differs_is_said_where_a_resumed_run_is_refused(run, folder, change, words):
    run.text("train", data=folder, micro_batch=8).ok()
    change(folder)
    refused = run("train", "--run", "run", "--resume", "--steps", "4").refused(2, "the data of", "has changed", *words)
    assert "first.txt" not in refused.stderr
    result = run("train", "--run", "run", "--resume-changed", "--steps", "4").ok()
    assert all(word in result.stdout for word in words) and "another run from here on" in result.stdout
