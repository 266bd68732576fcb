"""Resumed from corrupted checkpoints: they are named, and the newest valid one is used."""

import re

import pytest

from resuming import assert_same, checkpoints_of, contents, cut, killed, resume, whole  # noqa: F401

# Corruption

def flip(raw):
    return raw[: len(raw) // 2] + bytes([raw[len(raw) // 2] ^ 1]) + raw[len(raw) // 2 + 1 :]


DAMAGES = {"a bit": flip, "cut": lambda raw: raw[: len(raw) // 2], "empty": lambda raw: b"", "missing": None}


def damage(file, how):
    if DAMAGES[how] is None:
        file.unlink()
    else:
        file.write_bytes(DAMAGES[how](file.read_bytes()))


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json",
                                  "manifest.json", "recovery.safetensors"])
def test_a_corrupted_checkpoint_is_named_and_skipped(killed, resume, whole, name, how):
    older, newest = checkpoints_of(killed)
    damage(newest / name, how)
    result = resume("--json").ok()
    assert result.document["resumed_from"] == 4
    assert re.search(rf"warning.*{newest.name}", result.stderr), result.stderr
    assert_same(result, whole)


def crc32c(raw):
    """RFC 3720, appendix B.4, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in raw:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def test_a_checkpoint_of_another_version_is_not_skipped_for_an_older_one(killed, resume):
    manifest = checkpoints_of(killed)[-1] / "manifest.json"
    content, checksum = re.fullmatch(r'(.*),\n  "crc32c": "(.{8})"\n}\n', manifest.read_text(), re.DOTALL).groups()
    assert checksum == f"{crc32c(content.encode()):08x}" and content.count('"version": 2') == 1
    content = content.replace('"version": 2', '"version": 3')
    manifest.write_text(f'{content},\n  "crc32c": "{crc32c(content.encode()):08x}"\n}}\n')
    before = contents(killed)
    resume().refused(5, "step-00000008", "resume the run with the version that wrote it")
    assert contents(killed) == before


def test_if_every_checkpoint_is_corrupted_each_is_named(killed, resume):
    for checkpoint in checkpoints_of(killed):
        damage(checkpoint / "model.safetensors", "a bit")
    before = contents(killed)
    resume().refused(5, *(checkpoint.name for checkpoint in checkpoints_of(killed)))
    assert contents(killed) == before


def test_a_corrupted_checkpoint_is_not_kept_instead_of_a_valid_one(killed, resume):
    for checkpoint in checkpoints_of(killed)[-1:]:
        damage(checkpoint / "model.safetensors", "a bit")
    resume("--keep", "2").ok()
    assert [entry.name for entry in checkpoints_of(killed)] == ["step-00000008", "step-00000012"]
    damage(killed / "checkpoints" / "step-00000012" / "state.json", "empty")
    assert resume("--json").ok().document["resumed_from"] == 8
