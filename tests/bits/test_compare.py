"""tests/bits/compare sees every kind of difference, and a case cannot pass without its premise."""

import importlib.machinery
import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).resolve().parent
COMMAND = os.path.abspath(os.environ.get("MICROBATCH", HERE.parents[1] / "build" / "release" / "microbatch"))

sys.dont_write_bytecode = True
sys.path.insert(0, str(HERE))
loader = importlib.machinery.SourceFileLoader("bits_compare", str(HERE / "compare"))
compare = importlib.util.module_from_spec(importlib.util.spec_from_loader("bits_compare", loader))
loader.exec_module(compare)


@pytest.fixture
def changed(tmp_path):
    """The command behind a few lines of Python, which may change its `words` and, after run(), what it wrote."""

    def write(lines):
        file = tmp_path / "changed"
        file.write_text("#!/usr/bin/python3\nimport os, pathlib, re, subprocess, sys\n"
                        f"words = [{COMMAND!r}, *sys.argv[1:]]\n"
                        "folder = pathlib.Path(words[words.index('--run') + 1])\n"
                        "def run():\n    code = subprocess.call(words)\n    if code: sys.exit(code)\n"
                        f"{lines}\nos.execv(words[0], words)\n")
        file.chmod(0o755)
        return file

    return write


def compared(new, *words):
    """Exit code and rows of the table."""
    done = subprocess.run([HERE / "compare", COMMAND, new, *words], capture_output=True, text=True)
    assert done.stderr == ""
    return done.returncode, done.stdout


OTHER_SEED = "words[words.index('--seed') + 1] = '4'"


def test_a_build_has_the_same_bits_as_itself():
    code, said = compared(COMMAND, "--case", "noise", "--case", "spike", "--case", "resume")
    assert code == 0 and "3 cases" in said and "3 same" in said
    assert "noise measured 12 times" in said and "refused" in said and "paused at step-00000001-" in said


def test_another_seed_is_another_run(changed):
    code, said = compared(changed(OTHER_SEED), "--case", "noise")
    assert code == 1 and "1 different" in said
    for field in ("loss: step 1", "gradient_norm: step 1", "noise_batch: step", "held_out_loss:", "weights:"):
        assert f"\n    {field}" in said
    assert "\n    learning_rate" not in said and "\n    batch" not in said


def test_an_expected_difference_is_reported_and_does_not_fail(changed):
    code, said = compared(changed(OTHER_SEED), "--case", "noise", "--expect-different", "noise=another seed")
    assert code == 0 and "1 expected" in said and "loss: step 1" in said and "(expected: another seed)" in said


def test_an_expected_field_excuses_no_other(changed):
    code, said = compared(changed(OTHER_SEED), "--case", "noise", "--expect-different", "noise:weights=another seed")
    assert code == 1 and said.count("(expected: another seed)") == 1


def test_a_missing_expected_difference_is_reported():
    code, said = compared(COMMAND, "--case", "noise", "--expect-different", "noise:loss=smoother")
    assert code == 0 and "loss the same, though a difference was expected: smoother" in said


@pytest.mark.parametrize("case, lines, words", [
    ("spike", "words.append('--no-guard')", "no step was refused"),
    ("guard", "words[words.index('--lr') + 1] = '0.001'", "no step was refused"),
    ("guard", "words[words.index('--restores') + 1] = '0'", "never rolled back"),
    ("out-of-memory", "del os.environ['MICROBATCH_BUDGET_DRILL']", "memory never ran out"),
    ("recompute", "words[words.index('--recompute') + 1] = 'never'", "not recomputed"),
    ("noise", "words[words.index('--noise-every') + 1] = '0'", "the noise was measured less than twice"),
    ("resume", "words[words.index('--micro-batch') + 1] = '256'", "new: the run was interrupted between two steps"),
    ("images-batch", "words[words.index('--norm') + 1] = 'group'", "no running means"),
    ("text", "words[words.index('--micro-batch') + 1] = '10'", "no batch ends in a smaller micro-batch"),
    ("noise", "print('no such device', file=sys.stderr); sys.exit(1)", "new: exit code 1: no such device"),
])
def test_a_case_without_its_premise_fails(changed, case, lines, words):
    code, said = compared(changed(lines), "--case", case)
    assert code == 1 and "1 failed" in said and words in said


def test_a_run_that_resumes_with_different_bits_is_detected(changed):
    file = changed("if '--resume' in words and len((folder / 'metrics.jsonl').read_text().splitlines()) >= 3:\n"
                   "    run()\n    log = folder / 'metrics.jsonl'\n"
                   "    log.write_text(re.sub(r'\"loss\":(.)', '\"loss\":9', log.read_text()))\n    sys.exit()")
    code, said = compared(file, "--case", "resume")
    assert code == 1 and "loss: new, resumed: step 1" in said and "weights" not in said


@pytest.fixture
def run():
    def make(**changes):
        line = dict.fromkeys(compare.STEP_FIELDS, "1") | {"applied": True, "reason": "", "rolled_back_to": None}
        lines = [line | {"step": str(step), "loss": f"{step}.125"} for step in (1, 2)]
        tensors = {"head": ("F32", ["2"], bytes(8)), "body": ("F32", ["1"], bytes(4))}
        return compare.Run(**{"lines": lines, "exit_code": 0, "held_out_loss": "2.5", "tensors": tensors,
                              "paused_at": []} | changes)

    return make


@pytest.mark.parametrize("field", compare.STEP_FIELDS)
def test_every_field_of_a_step_is_compared(run, field):
    first, last = run().lines
    found = compare.differences(run(), run(lines=[first, last | {field: "other"}]))
    assert found == {field: f"step 2: {last[field]} became other"}


@pytest.mark.parametrize("changes, found", [
    ({}, {}),
    ({"exit_code": 4}, {"exit_code": "0 became 4"}),
    ({"held_out_loss": "2.50"}, {"held_out_loss": "2.5 became 2.50"}),
    ({"tensors": {"head": ("F32", ["2"], bytes(7) + b"\1"), "body": ("F32", ["1"], bytes(4))}},
     {"weights": "head: 1 of 8 bytes"}),
    ({"tensors": {"head": ("F32", ["2", "1"], bytes(8)), "body": ("F32", ["1"], bytes(4))}},
     {"weights": "head: ['F32', ['2']] became ['F32', ['2', '1']]"}),
    ({"tensors": {"head": ("F32", ["2"], bytes(8))}}, {"weights": "tensors only in one: body"}),
])
def test_the_end_of_a_run_is_compared(run, changes, found):
    assert compare.differences(run(), run(**changes)) == found


def test_a_run_with_fewer_steps_differs(run):
    assert compare.differences(run(), run(lines=run().lines[:1])) == {"steps": "2 became 1"}


def test_numbers_are_compared_digit_by_digit(tmp_path):
    """As text: two numbers that round to the same double differ, as do 1 and 1.0."""
    line = ",".join(f'"{field}":1' for field in compare.STEP_FIELDS)
    read = []
    for loss in ("0.1", "0.10000000000000000001"):
        (tmp_path / "metrics.jsonl").write_text("{" + line.replace('"loss":1', f'"loss":{loss}') + "}\n")
        read.append(compare.lines_of(tmp_path)[0]["loss"])
    assert read == ["0.1", "0.10000000000000000001"]


def test_a_log_without_a_field_that_is_compared_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step":1}\n')
    with pytest.raises(compare.Failed, match="step 1 has no samples, tokens"):
        compare.lines_of(tmp_path)


@pytest.mark.parametrize("words, told", [
    (["nosuch", COMMAND], "nosuch is not a command"), ([COMMAND], "NEW"),
    ([COMMAND, COMMAND, "--expect-different", "gaurd"], "a case is one of text"),
    ([COMMAND, COMMAND, "--expect-different", "guard:lose=x"], "a field of step"),
    ([COMMAND, COMMAND, "--keep", "/"], "exists already"),
])
def test_bad_usage_is_refused(words, told):
    done = subprocess.run([HERE / "compare", *words], capture_output=True, text=True)
    assert done.returncode == 2 and told in done.stderr and done.stdout == ""
