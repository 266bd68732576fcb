"""A disk that is too small for the files of a run: a small file system for this test."""

import re
import subprocess

import pytest

from conftest import TEXT, Result, words_of
from resuming import checkpoints_of

# With two snapshots of the guard a checkpoint of this job has 620 KiB, the weights have 84 KiB.
FLAGS = {"micro_batch": 8, "checkpoint_every": "4 steps", "no_verify": True}


@pytest.fixture
def on_disk(run):
    """Trains in a file system of so many KiB, which lives as long as the process that has made it waits for its input."""
    place = run.folder / "disk"
    place.mkdir()
    begun = []

    def train(size, **flags):
        mount = f'mount -t tmpfs -o size={size}k none "$1" && echo made && exec cat'
        holder = subprocess.Popen(["unshare", "--map-root-user", "--mount", "sh", "-c", mount, "sh", str(place)],
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        begun.append(holder)
        if holder.stdout.readline() != "made\n":
            pytest.skip(f"no right to make a file system: {holder.communicate()[1]}")
        folder = f"/proc/{holder.pid}/root{place}/run"
        words = {"data": run.data.text} | TEXT | FLAGS | {"run": folder} | flags
        result = run.in_folder(folder, ["train", *words_of(words)])
        return Result(result.returncode, result.stdout.replace(folder, "run"), result.stderr.replace(folder, "run"),
                      result.folder)

    yield train
    for holder in begun:
        holder.kill()
        holder.communicate()


FULL = r"^warning: checkpoints and weights may fill the disk; [\d.]+ [KM]iB are needed, [\d.]+ [KM]iB are free in run: older "


def test_the_free_space_is_checked_at_the_start(on_disk, run):
    result = on_disk(2000).ok()
    assert re.search(FULL + "checkpoints will then be deleted for new ones$", result.stdout, re.MULTILINE), result.stdout
    enough = on_disk(4000, steps=2).ok()
    assert "fill the disk" not in enough.stdout


def test_on_a_full_disk_the_oldest_checkpoint_is_deleted(on_disk, run):
    result = on_disk(2000, steps=80).ok()
    assert "was not written" not in result.stdout
    left = [checkpoint.name for checkpoint in checkpoints_of(result.folder)]
    assert left[-1] == "step-00000080" and len(left) < 3
    assert "model.safetensors" in result.files


def test_the_only_checkpoint_is_not_deleted_and_the_needed_space_is_named(on_disk):
    result = on_disk(900, steps=80).ok()
    (warning, *_) = re.findall(r"^warning: the checkpoint of step \d+ was not written: .*$", result.stdout, re.MULTILINE)
    assert re.search(r"No space left on device; [\d.]+ [KM]iB are needed, [\d.]+ [KM]iB are free; the run continues", warning)
    assert len(checkpoints_of(result.folder)) == 1 and result.column("step") == list(range(1, 81))


def test_weights_that_do_not_fit_are_an_error_of_their_own_that_names_the_space(on_disk):
    result = on_disk(80, steps=8, no_checkpoints=True)
    result.refused(6, "model.safetensors", "No space left on device", "83.9 KiB are needed", "are free")
    assert result.column("step") == list(range(1, 9))
