"""The cases of tests/bits/compare: flags of `microbatch train`, and the premise that each run must show."""

import dataclasses
import pathlib
import typing

# No batch leaves a rest of one sample, which splitting avoids since the redesign: see next_cut().
# Most cases read one file, so that a change to how folders are read shows only in the case "text".
FOLDER = {"data": "/usr/share/games/fortunes"}
TEXT = {"data": "/usr/share/games/fortunes/literature"}
SMALL_TEXT = TEXT | {"layers": 1, "heads": 2, "width": 32, "length": 16}
IMAGES = {"data": "/usr/share/datasets/fashion-mnist", "model": "resnet"}
SMALL_IMAGES = IMAGES | {"layers": 1, "width": 8}
# The free memory of the machine must not decide where snapshots and copies of the gradients go.
ALWAYS = {"memory": "256MiB", "threads": 1, "recompute": "never", "seed": 3}


class Failed(Exception):
    """A run ended badly, or did not show what its case is for."""


def require(condition, what):
    if not condition:
        raise Failed(what)


@dataclasses.dataclass
class Run:
    lines: list          # of metrics.jsonl; numbers as their text
    exit_code: int
    held_out_loss: str
    tensors: dict        # name: (dtype, shape, bytes)
    paused_at: list      # names of the checkpoints it resumed from

    def column(self, field):
        return [line[field] for line in self.lines]

    def count(self, condition):
        return sum(bool(condition(line)) for line in self.lines)


# The premises: each returns what it saw in the run, for the table, or raises Failed.

def is_ragged(run):
    rests = {int(line["batch"]) % int(line["micro_batch"]) for line in run.lines}
    require(0 not in rests, "no batch ends in a smaller micro-batch")
    return "last micro-batch of " + ", ".join(map(str, sorted(rests)))


def has_group_norm(run):
    require(not any("running_mean" in name for name in run.tensors), "there are running means: batch norm?")
    return is_ragged(run)


def has_batch_norm(run):
    require(any("running_mean" in name for name in run.tensors), "there are no running means: no batch norm?")
    return is_ragged(run)


def recomputes(run):
    require(all(run.column("recompute")), "activations are not recomputed in every step")
    return "every step recomputes"


def keeps(run):
    require(not any(run.column("recompute")), "activations are recomputed in a step")
    return "no step recomputes"


def refuses(run):
    refused = run.count(lambda line: not line["applied"])
    require(refused > 0, "no step was refused")
    require(all(line["reason"] for line in run.lines if not line["applied"]), "a step was refused without a reason")
    return f"{refused} refused"


def rolls_back(run):
    seen, back = refuses(run), [line for line in run.lines if line["rolled_back_to"] is not None]
    require(back, "the run never rolled back to a snapshot")
    require(any(line["applied"] for line in run.lines[int(back[0]["step"]):]), "no step was applied after the roll-back")
    return f"{seen}, {len(back)} roll-backs"


def grows(run):
    batches = list(dict.fromkeys(run.column("batch")))
    require(len(batches) > 2, f"the batch did not grow twice: {batches}")
    return "batches of " + ", ".join(batches)


def runs_out_of_memory(run):
    lost = sum(map(int, run.column("out_of_memory")))
    cuts = list(dict.fromkeys(run.column("micro_batch")))
    require(lost > 0, "memory never ran out")
    require(len(cuts) > 1, "memory ran out, and the micro-batch is the same")
    return f"{lost} out of memory, micro-batches of {', '.join(cuts)}"


def falls_back_to_recompute(run):
    states = list(dict.fromkeys(run.column("recompute")))
    require(states == [False, True], f"the run did not change from keeping activations to recomputing them: {states}")
    return f"{sum(map(int, run.column('out_of_memory')))} out of memory, then recomputed"


def measures_noise(run):
    measured = run.count(lambda line: line["gradient_variance"] is not None)
    require(measured > 1, "the noise was measured less than twice")
    require(run.lines[-1]["noise_batch"] is not None, "the noise was measured, but there is no noise_batch")
    return f"noise measured {measured} times"


def was_paused(run):
    return "paused at " + ", ".join(run.paused_at)  # train() requires it


def text_with_spike():
    """English with 320 bytes of another script: a batch that draws them has an outlying gradient."""
    text = pathlib.Path(TEXT["data"]).read_bytes()
    return text[:30_000] + "λόγος ".encode() * 29 + text[30_000:]


@dataclasses.dataclass
class Case:
    flags: dict
    shows: typing.Callable
    environment: dict = dataclasses.field(default_factory=dict)
    files: dict = dataclasses.field(default_factory=dict)  # name: what makes its contents, beside the runs
    pause_after: tuple = ()    # these steps, in the middle of the next batch
    exit_codes: tuple = (0,)


CASES = {
    "text": Case(FOLDER | {"batch": 20, "micro_batch": 8, "length": 64, "steps": 10}, is_ragged),
    "text-threads": Case(TEXT | {"batch": 20, "micro_batch": 8, "length": 64, "steps": 6, "threads": 2}, is_ragged),
    "images-group": Case(IMAGES | {"norm": "group", "batch": 40, "micro_batch": 16, "steps": 10}, has_group_norm),
    "images-batch": Case(IMAGES | {"norm": "batch", "batch": 40, "micro_batch": 16, "steps": 10}, has_batch_norm),
    "recompute": Case(TEXT | {"batch": 20, "micro_batch": 8, "length": 64, "dropout": 0.1, "steps": 10,
                              "recompute": "always"}, recomputes),
    "no-recompute": Case(TEXT | {"batch": 20, "micro_batch": 8, "length": 64, "dropout": 0.1, "steps": 10}, keeps),
    # The rate rises until the loss climbs away, several times.
    "guard": Case(SMALL_TEXT | {"batch": 6, "micro_batch": 4, "optimizer": "sgd", "momentum": 0, "weight_decay": 0,
                                "lr": 6, "clip": "inf", "schedule": "constant", "warmup": "300 steps", "steps": 300,
                                "restores": 20}, rolls_back, exit_codes=(0, 4)),
    "guard-images": Case(SMALL_IMAGES | {"norm": "group", "batch": 10, "micro_batch": 4, "optimizer": "sgd", "lr": 12,
                                         "clip": "inf", "schedule": "constant", "warmup": "200 steps", "steps": 200},
                         rolls_back, exit_codes=(0, 4)),
    "spike": Case(SMALL_TEXT | {"data": "spike.txt", "batch": 4, "micro_batch": 2, "lr": 0.003, "steps": 300},
                  refuses, files={"spike.txt": text_with_spike}),
    "batch-schedule": Case(SMALL_TEXT | {"batch_schedule": "6 at 0, 10 at 102 samples, 14 at 402 samples",
                                         "micro_batch": 4, "lr": 0.005, "samples": 1006}, grows),
    "resume": Case(TEXT | {"layers": 2, "width": 64, "length": 32, "batch": 257, "micro_batch": 3, "dropout": 0.1,
                           "steps": 4, "noise_every": 2}, was_paused, pause_after=(1, 3)),
    "resume-images": Case(SMALL_IMAGES | {"norm": "batch", "batch": 512, "micro_batch": 5, "steps": 3,
                                          "optimizer": "sgd"}, was_paused, pause_after=(1,)),
    # The new budget lies between the needs of micro-batches of 16 and of 8.
    "out-of-memory": Case(TEXT | {"batch": 40, "micro_batch": 16, "dropout": 0.1, "steps": 10}, runs_out_of_memory,
                          {"MICROBATCH_BUDGET_DRILL": "5 44MiB"}),
    # And here between the needs with recompute and without. While memory is ample, auto does not recompute.
    "out-of-memory-recompute": Case(TEXT | {"layers": 8, "width": 64, "length": 128, "batch": 8, "micro_batch": 1,
                                            "dropout": 0.1, "steps": 8, "recompute": "auto"}, falls_back_to_recompute,
                                    {"MICROBATCH_BUDGET_DRILL": "3 10400KiB"}),
    "noise": Case(IMAGES | {"model": "mlp", "batch": 100, "micro_batch": 32, "optimizer": "sgd", "momentum": 0.9,
                            "steps": 60, "noise_every": 5}, measures_noise),
}
