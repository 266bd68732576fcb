"""How tests wait: for a condition, and for a process that stands still where they want it, on any machine.

No test says how long something takes. Where one has to act in the middle of a batch, of planning or of an evaluation, a
Gate stops the process there, the test acts, and the process goes on.
"""

import ctypes
import mmap
import os
import pathlib
import subprocess
import time

# Seconds that no test reaches unless something hangs.
HANG = 300

SOURCE = pathlib.Path(__file__).resolve().parents[1] / "support" / "gate.c"
POINTS = {"backward": 0, "switch": 1}  # a backward pass; gradients switched on or off, as in a forward pass without


def wait_until(condition, process=None):
    """Returns once the condition holds; fails if the process ends before."""
    end = time.monotonic() + HANG
    while not condition():
        ended = process is not None and process.poll() is not None
        # What it did last may be what is waited for.
        assert not ended or condition(), f"ended with {process.returncode}: {told_by(process)}"
        assert time.monotonic() < end, f"still not so after {HANG} s"
        time.sleep(0.005)


def told_by(process):
    return process.stderr.read() if process.stderr else ""


def deliver(process, sent):
    """Sends a signal and returns once the process has taken it."""
    process.send_signal(sent)

    def is_taken():
        try:
            status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
        except FileNotFoundError:
            return True
        fields = dict(line.split(":", 1) for line in status.splitlines())
        waiting = int(fields["ShdPnd"], 16) | int(fields["SigPnd"], 16)
        return fields["State"].split()[0] in "ZX" or not waiting >> (sent - 1) & 1

    wait_until(is_taken)


def build_gate(folder):
    """The library that a process is to preload."""
    library = pathlib.Path(folder) / "gate.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl"], check=True)
    return library


class Shared(ctypes.Structure):
    """As in gate.c."""

    _fields_ = [(name, ctypes.c_int32) for name in ("point", "lines", "left", "held", "released", "frozen")] + [
        ("ahead", ctypes.c_int64), ("a_pass", ctypes.c_int64), ("file", ctypes.c_char * 1024)]


class Gate:
    """Stops one process at points of its work; start it with `environment`. A gate is open until it is closed."""

    def __init__(self, library, page):
        pathlib.Path(page).write_bytes(bytes(ctypes.sizeof(Shared)))
        with open(page, "r+b") as file:
            self.shared = Shared.from_buffer(mmap.mmap(file.fileno(), 0))
        self.shared.left = -1
        self.library, self.page = library, page

    @property
    def environment(self):
        return os.environ | {"LD_PRELOAD": str(self.library), "MICROBATCH_GATE": str(self.page),
                             "ASAN_OPTIONS": os.environ.get("ASAN_OPTIONS", "") + ":verify_asan_link_order=0"}

    def close(self, file=None, lines=0, after=0, point="backward"):
        """Stops the process at the point, `after` of them later: from its start, or once the file has so many lines.

        The gate is to be closed while the process stands, or before it is started.
        """
        self.shared.point = POINTS[point]
        self.shared.file = str(file or "").encode()
        self.shared.lines = -1 if file is None else lines
        self.shared.left = after

    def wait(self, process):
        """Returns once the process stands."""
        wait_until(lambda: self.is_holding, process)

    @property
    def is_holding(self):
        return self.shared.held > self.shared.released

    def release(self):
        """On to where the gate is closed now."""
        self.shared.released = self.shared.held

    def open(self):
        """On, and nowhere held again."""
        self.shared.left = -1
        self.release()

    def pass_on(self, points, process):
        """On to so many points later."""
        self.shared.left = points - 1
        self.release()
        self.wait(process)

    def stop_clock(self):
        """The monotonic clock stands still but for advance()."""
        self.shared.frozen = 1

    def advance(self, seconds):
        self.shared.ahead += int(seconds * 1e9)

    def pace(self):
        """A backward pass takes a hundredth of a second of the monotonic clock, and nothing else takes any time."""
        self.stop_clock()
        self.shared.a_pass = 10_000_000
