"""What every test of the command needs: real data made small, and the command run on it as a user would.

`run("plan", "--json", ...)` gives the words as they stand. `run.text("train", batch=4)` and `run.images("train")` add a
tiny job: every flag of TEXT or IMAGES can be changed or, with None, left out; True is a flag without a value.
"""

import dataclasses
import gzip
import json
import os
import pathlib
import re
import shutil
import struct
import subprocess
from array import array

import pytest

pytest.register_assert_rewrite("resuming", "gate")

from gate import HANG, Gate, build_gate, deliver  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[2]
COMMAND = os.path.abspath(os.environ.get("MICROBATCH", ROOT / "build" / "release" / "microbatch"))
FORTUNES = pathlib.Path("/usr/share/games/fortunes")
FASHION = pathlib.Path("/usr/share/datasets/fashion-mnist")

# One thread: the machine is shared, and two threads that wait for each other become many times slower.
SHARED = {"threads": 1, "memory": "64MiB", "batch": 8}
TEXT = SHARED | {"layers": 1, "heads": 2, "width": 32, "length": 16}
IMAGES = SHARED | {"model": "resnet", "norm": "group", "layers": 1, "width": 8}
OF_COMMAND = {"train": {"run": "run", "steps": 2}, "plan": {}, "compare": {"samples": 64}, "advise": {"steps": 4}}
# A job of many blocks.
DEEP = {"layers": 12, "heads": 1, "width": 16, "batch": 8}
PARTS = ["parameters", "gradients", "optimizer state", "activations", "other"]
FILES = {"checkpoints", "config.toml", "metrics.jsonl", "model.safetensors", "report.html", "summary.json",
         "events.out.tfevents.*"}
HINT = "Run with --help for more information."


@dataclasses.dataclass
class Data:
    text: pathlib.Path
    images: pathlib.Path
    images_gz: pathlib.Path
    tokens: pathlib.Path
    tokens_llmc: pathlib.Path


@dataclasses.dataclass
class Result:
    returncode: int
    stdout: str
    stderr: str
    folder: pathlib.Path

    def ok(self):
        assert self.returncode == 0, self.stderr
        return self

    def refused(self, code, *words):
        """One line that begins with the command's name and says `words`, at most the hint beside it, nothing else."""
        assert self.returncode == code, (self.returncode, self.stderr)
        lines = self.stderr.splitlines()
        assert lines and lines[0].startswith("microbatch: "), self.stderr
        assert lines[1:] in ([], [HINT]), self.stderr
        for word in words:
            assert word in lines[0], f"no {word!r} in {lines[0]!r}"
        for trace in ("terminate called", "what()", "c10::", "std::", "0x7f", "Exception raised", ".cpp"):
            assert trace not in self.stderr
        assert "\x1b" not in self.stderr
        if code in (2, 5):
            assert self.stdout == ""
        return self

    def misfit(self, *words):
        """Nothing fits: the smallest peak, what it is made of in bytes, and what would help; {part: bytes}."""
        assert self.returncode == 3, (self.returncode, self.stderr)
        first, *parts, last = self.stderr.splitlines()
        assert re.match(r"microbatch: (nothing fits: the smallest peak|the micro-batch of \d+ samples? that was asked "
                        r"for does not fit:).* needs [\d.]+ \w+, .* more than the memory budget of [\d.]+ \w+$",
                        first), first
        assert last.startswith("what would help: a budget of "), last
        for word in words:
            assert word in self.stderr, f"no {word!r} in {self.stderr!r}"
        assert "\x1b" not in self.stderr
        told = dict(re.match(r"  ([a-z ]+?) {2,}([\d.]+ [KMGT]?i?B)\b", line).groups() for line in parts)
        assert list(told) == PARTS
        return {name: in_bytes(size) for name, size in told.items()}

    @property
    def document(self):
        return json.loads(self.stdout)

    @property
    def metrics(self):
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    @property
    def files(self):
        return {"events.out.tfevents.*" if file.name.startswith("events.out.tfevents.") else file.name
                for file in self.folder.iterdir()}

    def column(self, name):
        return [line[name] for line in self.metrics]

    @property
    def weights(self):
        """{name: (shape, numbers)}, read by the format's own description and nothing else's reader."""
        raw = (self.folder / "model.safetensors").read_bytes()
        (size,) = struct.unpack("<Q", raw[:8])
        header, body = json.loads(raw[8 : 8 + size]), raw[8 + size :]
        header.pop("__metadata__", None)
        end = 0
        for entry in sorted(header.values(), key=lambda each: each["data_offsets"]):
            assert entry["dtype"] == "F32" and entry["data_offsets"][0] == end
            end = entry["data_offsets"][1]
        assert end == len(body)
        return {
            name: (entry["shape"], array("f", body[slice(*entry["data_offsets"])])) for name, entry in header.items()
        }


def in_bytes(size):
    """Bytes of a size as the command prints it, "1.5 MiB"."""
    number, unit = size.split()
    return float(number) * 1024 ** ["B", "KiB", "MiB", "GiB", "TiB"].index(unit)


def chosen_of(document):
    """The candidate that a plan chose."""
    return next(each for each in document["candidates"]
                if (each["micro_batch"], each["recompute"]) == (document["micro_batch"], document["recompute"]))


def weights_file(result):
    return (result.folder / "model.safetensors").read_bytes()


def words_of(flags):
    words = []
    for name, value in flags.items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return words


class Run:
    def __init__(self, folder, data, environment=None):
        self.folder, self.data, self.started, self.environment = folder, data, [], environment

    def __call__(self, *words, **options):
        return self.in_folder("run", words, **options)

    def text(self, command, **flags):
        return self.job(command, {"data": self.data.text} | TEXT, flags)

    def images(self, command, **flags):
        return self.job(command, {"data": self.data.images} | IMAGES, flags)

    def job(self, command, defaults, flags):
        flags = defaults | OF_COMMAND[command] | flags
        return self.in_folder(flags.get("run") or "", [command, *words_of(flags)])

    def in_folder(self, name, words, timeout=HANG, **options):
        done = subprocess.run([COMMAND, *map(str, words)], cwd=self.folder, stdin=subprocess.DEVNULL, text=True,
                              timeout=timeout, **({"capture_output": True, "env": self.environment} | options))
        return Result(done.returncode, done.stdout, done.stderr, self.folder / str(name))

    def start(self, command, gate=None, options=None, **flags):
        """The same text job, running: the caller waits for it. Options are those of Popen."""
        words = words_of({"data": self.data.text} | TEXT | OF_COMMAND[command] | flags)
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | (options or {})
        if gate is not None:
            options["env"] = gate.environment
        self.started.append(subprocess.Popen([COMMAND, command, *words], cwd=self.folder, stdin=subprocess.DEVNULL,
                                             text=True, **options))
        return self.started[-1]

    def start_closed(self, command, gate, lines=0, after=0, options=None, **flags):
        """Started with a gate, and stopped in the pass that comes so many after the log has so many lines."""
        gate.close(self.folder / "run" / "metrics.jsonl", lines, after)
        process = self.start(command, gate, options, **flags)
        gate.wait(process)
        return process


def ended(process):
    """(stdout, stderr) of a process that comes to its end."""
    return process.communicate(timeout=HANG)


def lines_of(run, name="run"):
    """Steps in the log of a run, -1 while there is none."""
    file = run.folder / name / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else -1


def stop_in_a_batch(run, gate, sent, after_steps=0, micro_batches=2, **flags):
    """Sends the signal in the batch after so many steps, when so many of its micro-batches are done; (stdout, stderr)."""
    # The signal comes in the micro-batch before its backward pass, and that one is finished.
    process = run.start_closed("train", gate, lines=after_steps, after=micro_batches - 1, **flags)
    deliver(process, sent)
    gate.open()
    out, err = ended(process)
    assert process.returncode == 130, err
    return out, err


def write_idx(folder, split, count, compressed):
    folder.mkdir(exist_ok=True)
    for name, item, header in ((f"{split}-images-idx3-ubyte", 784, 16), (f"{split}-labels-idx1-ubyte", 1, 8)):
        raw = gzip.open(FASHION / f"{name}.gz").read(header + count * item)
        raw = raw[:4] + struct.pack(">I", count) + raw[8:]
        (folder / f"{name}.gz").write_bytes(gzip.compress(raw)) if compressed else (folder / name).write_bytes(raw)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    text = b"".join((FORTUNES / name).read_bytes() for name in ("science", "computers", "cookie"))[:60_000]
    (folder / "fortunes.txt").write_bytes(text)
    tokens = struct.pack("<20000H", *text[:20_000])
    (folder / "nano.bin").write_bytes(tokens)
    # llm.c: 256 int32 of header (magic number, version, count), then the tokens.
    (folder / "llmc.bin").write_bytes(struct.pack("<256i", 20240520, 1, 20_000, *[0] * 253) + tokens)
    for name, compressed in (("images", False), ("images_gz", True)):
        write_idx(folder / name, "train", 300, compressed)
        write_idx(folder / name, "t10k", 60, compressed)
    return Data(folder / "fortunes.txt", folder / "images", folder / "images_gz", folder / "nano.bin",
                folder / "llmc.bin")


@pytest.fixture
def run(tmp_path, data):
    run = Run(tmp_path, data)
    yield run
    for process in run.started:  # those of a test that failed
        process.kill()


@pytest.fixture(scope="session")
def gate_library(tmp_path_factory):
    return build_gate(tmp_path_factory.mktemp("gate"))


@pytest.fixture
def new_gate(gate_library, tmp_path_factory):
    """Makes gates, each for one process."""
    return lambda: Gate(gate_library, tmp_path_factory.mktemp("gate") / "page")


@pytest.fixture
def gate(new_gate):
    return new_gate()


@pytest.fixture
def paced(run, gate):
    """What the planner measures is the same on every machine: two samples at once take as long as one."""
    gate.pace()
    return Run(run.folder, run.data, gate.environment)


@pytest.fixture(scope="module")
def shared_paced(tmp_path_factory, data, gate_library):
    gate = Gate(gate_library, tmp_path_factory.mktemp("gate") / "page")
    gate.pace()
    return Run(tmp_path_factory.mktemp("shared"), data, gate.environment)


@pytest.fixture(scope="module")
def shared_run(tmp_path_factory, data):
    """For what many tests of a file only look at."""
    return Run(tmp_path_factory.mktemp("shared"), data)


@pytest.fixture
def broken_images(tmp_path, data):
    """A copy of the image folder, one file of it changed by a function of its bytes (None: the file is not there)."""

    def broken(name, change):
        folder = shutil.copytree(data.images, tmp_path / "broken")
        changed = change((folder / name).read_bytes())
        (folder / name).unlink() if changed is None else (folder / name).write_bytes(changed)
        return folder

    return broken
