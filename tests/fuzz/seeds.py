#!/usr/bin/env python3
"""Writes the seeds of tests/fuzz/corpus. Findings that were kept there have other names and stay."""

import gzip
import json
import pathlib
import struct

CORPUS = pathlib.Path(__file__).resolve().parent / "corpus"


def write(target, name, content):
    (CORPUS / target).mkdir(parents=True, exist_ok=True)
    (CORPUS / target / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def units():
    for name, content in {
        "size": "1.5GiB",
        "count": "10k",
        "interval": "2.5k samples",
        "schedule": "32 at 0, 128 at 2M tokens, 512 at 1G tokens",
        "shape": "cosine",
        "rule": "adam-sde",
        "spaces": "  400 MiB\t",
        "largest": "9223372036854775807",
    }.items():
        write("units", name, content)


def idx():
    def array(*lengths):
        size = 1
        for length in lengths:
            size *= length
        header = bytes([0, 0, 8, len(lengths)]) + struct.pack(f">{len(lengths)}I", *lengths)
        return header + bytes(i % 251 for i in range(size))

    write("idx", "labels", array(10))
    write("idx", "images", array(3, 4, 5))
    write("idx", "labels.gz", gzip.compress(array(10), mtime=0))
    write("idx", "images.gz", gzip.compress(array(3, 28, 28), mtime=0))
    write("idx", "huge", array(1)[:4] + struct.pack(">I", 0xFFFFFFFF))
    write("idx", "bomb.gz", gzip.compress(array(10) + bytes(1 << 20), mtime=0))


def tokens():
    some = struct.pack("<9H", 50256, 1, 65535, 0, 7, 8, 9, 10, 11)
    write("tokens", "nanogpt", some)
    for name, magic, version in [("llmc", 20240520, 1), ("uint32", 20240801, 1), ("other", 20240520, 2)]:
        write("tokens", name, struct.pack("<3i", magic, version, 9).ljust(1024, b"\0") + some)


def run_log():
    step = {
        "step": 1, "samples": 64, "tokens": 64, "batch": 64, "loss": 2.5, "weight": 64.0, "learning_rate": 0.1,
        "gradient_norm": 1.5, "micro_batch": 16, "micro_batches": 4, "recompute": False, "out_of_memory": 0,
        "step_seconds": 0.25, "update_seconds": 0.01, "predicted_step_seconds": None, "peak_bytes": 1000000,
        "predicted_peak_bytes": 1100000, "applied": True, "reason": "", "rolled_back_to": None,
        "gradient_variance": None, "squared_gradient": None, "noise_batch": None,
    }  # fmt: skip
    bad = {**step, "step": 2, "loss": "nan", "gradient_norm": "inf", "applied": False, "reason": "the loss is nan"}
    bad.update(rolled_back_to=1, predicted_step_seconds=0.5, noise_batch=120.5, out_of_memory=1)
    lines = json.dumps(step) + "\n" + json.dumps(bad) + "\n"
    write("run_log", "whole", lines)
    write("run_log", "cut", lines[:-40])


def run_summary():
    whole = {
        "banner": "stopped by the guard",
        "held_out_loss": 1.25,
        "tables": [{"title": "Strategies", "heading": ["name", "peak"], "rows": [["one", "1 MiB"]], "note": ""}],
        "curves": [
            {"title": "Peak", "along": "batch", "x": [1, 2], "lines": [{"name": "a", "y": [1.5, None]}], "note": "n"}
        ],
    }
    write("run_summary", "whole", json.dumps(whole, indent=2))
    write("run_summary", "empty", json.dumps({"banner": "", "held_out_loss": None, "tables": [], "curves": []}))


def safetensors():
    entries = {
        "__metadata__": {"microbatch.strides": json.dumps({"weight": [1, 2]}), "format": "pt"},
        "weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "none": {"dtype": "I64", "shape": [0, 4], "data_offsets": [24, 24]},
        "bias": {"dtype": "BF16", "shape": [3], "data_offsets": [24, 30]},
        "scalar": {"dtype": "BOOL", "shape": [], "data_offsets": [30, 31]},
    }
    header = json.dumps(entries).encode()
    write("safetensors", "whole", struct.pack("<Q", len(header)) + header + bytes(range(31)))
    write("safetensors", "cut", struct.pack("<Q", len(header)) + header + bytes(range(30)))
    write("safetensors", "header_alone", struct.pack("<Q", 31) + header)
    huge = json.dumps({"a": {"dtype": "F64", "shape": [1 << 31, 1 << 29], "data_offsets": [0, 1 << 63]}}).encode()
    write("safetensors", "huge", struct.pack("<Q", 1 << 63) + huge)


def manifest():
    files = {
        "model.safetensors": {"bytes": 1234, "crc32c": "0123abcd"},
        "state.json": {"bytes": 99, "crc32c": "ffffffff"},
    }
    whole = {
        "version": 2, "steps": 10, "samples": 640, "tokens": 640, "open_samples": 0, "healthy": True, "kept": False,
        "files": files,
    }  # fmt: skip
    # The target adds the checksum, and the end of the object.
    write("manifest", "before_the_checksum", json.dumps(whole, indent=2)[:-2])
    write("manifest", "another_version", json.dumps({**whole, "version": 1}, indent=2)[:-2])


def state():
    def gate(section):
        return {
            f"{section}gate/losses": [2.5, "inf"], f"{section}gate/gradient_norms": [1.5, 1],
            f"{section}gate/refused_in_a_row": 1, f"{section}gate/bound_diverged": 2.25, f"{section}gate/scale": "nan",
        }  # fmt: skip

    data = {"data/steps": 10, "data/samples": 640, "data/tokens": 640, "data/seed": 2**64 - 1, "data/healthy": True}
    whole = {
        **data, **gate(""), **gate("recovery/0/"), "recovery/0/steps": 5, "recovery/points": 1, "caps/caps": 1,
        "caps/0/fields": 2, "caps/0/0": [1, 28, 28], "caps/0/1": [], "noise/squared_gradient": -0.0,
        "run/learning_rate": 1e-3, "batch/before/training_flags": [1, 0], "notes/config": "data = 'é'\n",
    }  # fmt: skip
    write("state", "whole", json.dumps(whole))
    write("state", "bare", json.dumps(data))
    write("state", "list_beyond_int64", json.dumps({"caps/0/0": [2**63, 1], "gate/losses": [1.5, 2**63]}))
    write("state", "count_beyond_int64", json.dumps({"data/steps": 2**64, "data/seed": -(2**63)}))
    write("state", "named_twice", '{"a": 1, "a": [1, "x"]}')
    write("state", "nested", json.dumps({"data": {"steps": 1}, "list": [[1], None]}))


def config():
    lines = [
        'data = "/usr/share/games/fortunes"', 'model = "gpt-tiny"', "layers = 2", "length = 64", "dropout = 0.1",
        "batch = 64", 'micro-batch = 16', 'recompute = "always"', 'memory = "400MiB"', "steps = 100", "lr = 0.001",
        'schedule = "wsd"', 'warmup = "10 steps"', 'decay = "20 steps"', "clip = inf", "nesterov = false", "seed = 1",
    ]  # fmt: skip
    write("config", "whole", "\n".join(lines) + "\n")
    write("config", "strings", "data = 'a\\b'\nmodel = \"\"\"\nx\"\"\"\nseed = \"\\u0031\"\n")
    write("config", "numbers", "lr = 1e-3\nbatch = 0x40\nclip = -nan\nseed = 1_000\nwidth = 2024-01-02\n")
    write("config", "nested", "[data]\na = [1, {b = [[]]}]\n[[steps]]\n")


for make in (units, idx, tokens, run_log, run_summary, safetensors, manifest, state, config):
    make()
