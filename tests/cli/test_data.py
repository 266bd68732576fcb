"""Which files are read as data, and what the command says about them."""

import re
import shutil
import struct

import pytest


def said_of_data(result):
    """The lines that describe the data."""
    first, *lines = re.search(r"^data +.*\n(?: {8,}.*\n)*", result.stdout, re.MULTILINE)[0].splitlines()
    return [first[4:].strip(), *map(str.strip, lines)]


@pytest.fixture
def folder(run, data):
    """The folder that the commands run in, with a text in it."""
    shutil.copy(data.text, run.folder / "fortunes.txt")
    return run.folder


def test_a_folder_of_text_is_the_same_data_once_it_holds_runs(run, folder):
    first = run.text("train", data=".", run="runs/1").ok()
    assert said_of_data(first)[1:] == ["read fortunes.txt"]
    second = run.text("train", data=".", run="runs/2").ok()
    assert said_of_data(second) == [said_of_data(first)[0], "read fortunes.txt", "skipped 1 run folder (runs/1)"]
    assert second.column("loss") == first.column("loss")
    third = run.text("train", data=".", run=".").ok()
    assert third.column("loss") == first.column("loss")
    resumed = run.in_folder(".", ["train", "--run", ".", "--resume", "--steps", "4"]).ok()
    assert resumed.column("step") == [1, 2, 3, 4]


def test_runs_with_default_names_in_the_data_folder_are_skipped(run, folder):
    """cd d; microbatch train --data .: three times."""
    said = [said_of_data(run.text("train", data=".", run=None, micro_batch=8).ok()) for _ in range(3)]
    first, second, third = sorted(path.name for path in (folder / "runs").iterdir())
    assert [lines[2:] for lines in said] == [[], [f"skipped 1 run folder (runs/{first})"],
                                             [f"skipped 2 run folders (runs/{first}, runs/{second})"]]
    assert len({path.read_bytes() for path in folder.glob("runs/*/model.safetensors")}) == 1


@pytest.mark.parametrize("command", ["train", "plan"])
def test_what_is_read_and_skipped_is_listed(run, folder, command):
    (folder / "notes.txt").write_bytes(b"\xff\xfeh\0i\0")
    (folder / "link").symlink_to("fortunes.txt")
    described, *lines = said_of_data(run.text(command, data=".").ok())
    assert "of text" in described
    assert lines == ["read fortunes.txt", "skipped 1 link (link), 1 UTF-16 file (notes.txt)",
                     "warning: 1 UTF-16 file (notes.txt) skipped: to train on it, convert it to UTF-8"]


def test_a_stray_token_causes_a_warning(run, folder, data):
    tokens = bytearray(data.tokens.read_bytes())
    tokens[100:102] = struct.pack("<H", 65535)
    (folder / "stray.bin").write_bytes(tokens)
    assert any(line.startswith("warning: token 65,535 is far above the others")
               for line in said_of_data(run.text("plan", data="stray.bin", memory=None).ok()))


def test_data_of_another_kind_is_refused(run, folder, data):
    tokens = struct.unpack("<20000H", data.tokens.read_bytes())
    (folder / "wide.bin").write_bytes(struct.pack("<20000I", *tokens))
    run.text("train", data="wide.bin").refused(5, "wide.bin", "every second token is 0", "uint32")
    (folder / "set").mkdir()
    for name in ("dataset_info.json", "state.json"):
        (folder / "set" / name).write_text("{}" * 1000)
    run.text("train", data="set").refused(5, "set", "save_to_disk")
    for name in ("train.bin", "val.bin"):
        shutil.copy(data.tokens, folder / name)
    run.text("train", data=".").refused(5, "train.bin, val.bin", "name the one to train on")


def test_an_incomplete_set_of_images_names_the_existing_file(run, broken_images):
    run.images("train", data=broken_images("train-labels-idx1-ubyte", lambda raw: None)).refused(
        5, "has train-images-idx3-ubyte but no train-labels-idx1-ubyte")


def test_a_quiet_run_still_warns(run, folder):
    (folder / "notes.txt").write_bytes(b"\xff\xfeh\0i\0")
    assert "warning: 1 UTF-16 file (notes.txt) skipped" in run.text("train", data=".", quiet=True).ok().stdout


@pytest.mark.parametrize("command", ["compare", "advise"])
def test_other_commands_list_what_they_read(run, folder, command):
    assert said_of_data(run.text(command, data=".").ok())[1] == "read fortunes.txt"


def test_data_that_differs_at_resume_is_reported_by_file(run, folder):
    run.text("train", data=".").ok()
    size = (folder / "fortunes.txt").stat().st_size
    (folder / "more.txt").write_bytes(b"more " * 200)
    again = ["train", "--run", "run", "--resume", "--steps", "4"]
    run(*again).refused(2, f"the data of {folder}/. has changed: 1 file of {size:,} bytes became 2 files of {size + 1000:,} bytes: "
                           "more.txt (1,000 bytes) is new", "--resume-changed")
    (folder / "more.txt").unlink()
    text = (folder / "fortunes.txt").read_bytes()
    (folder / "fortunes.txt").write_bytes(text[:-5000])
    run(*again).refused(2, "has changed: fortunes.txt ", f"{size:,}", f"{size - 5000:,} bytes")
    (folder / "fortunes.txt").rename(folder / "other.txt")
    run(*again).refused(2, "has changed: ", "fortunes.txt", "is missing", "other.txt")
    (folder / "other.txt").rename(folder / "fortunes.txt")
    (folder / "fortunes.txt").write_bytes(b"#" + text[1:])
    run(*again).refused(2, f"the data of {folder}/. has changed: fortunes.txt still has {size:,} bytes, but different content")
    told = run(*again, "--resume-changed").ok().stdout
    assert f"fortunes.txt still has {size:,} bytes, but different content: a different run from here on" in told
