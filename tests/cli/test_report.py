"""The page of a run, opened in a real browser, and its events, read by TensorBoard itself."""

import json
import math
import pathlib
import re
import shutil
import subprocess

import pytest

from gate import HANG
from test_guard import CLIMB

ROOT = pathlib.Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium")
# What a page says of itself once it is drawn: every chart's colours, and whether it is wider than the window.
PROBE = """<script>
const told = { width: innerWidth, wider: document.documentElement.scrollWidth > innerWidth, theme: document.documentElement.dataset.theme, charts: {} };
for (const canvas of document.querySelectorAll("#charts canvas")) {
  const pixels = new Uint32Array(canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.buffer);
  told.charts[canvas.closest(".card").id] = { colours: new Set(pixels).size, width: canvas.clientWidth };
}
document.getElementById("theme").click();
told.other = document.documentElement.dataset.theme;
document.body.dataset.told = JSON.stringify(told);
</script>"""
READ_EVENTS = """
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(sys.argv[1], size_guidance={"scalars": 0})
events.Reload()
print(json.dumps({tag: [[one.step, one.value] for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}))
"""


@pytest.fixture(scope="module")
def trained(shared_run):
    """A run with noise, a batch that grows, and all that the page draws."""
    return shared_run.text("train", run="trained", batch=None, batch_schedule="8 at 0, 16 at 10 steps", micro_batch=4,
                           noise_every=2, steps=30).ok()


@pytest.fixture(scope="module")
def stopped(shared_run):
    result = shared_run.text("train", run="stopped", **CLIMB)
    assert result.returncode == 4
    return result


def look(folder, tmp_path, size, *flags):
    """What the page tells in a window of this size, and what the browser had to say."""
    page = tmp_path / "page.html"
    page.write_text((folder / "report.html").read_text().replace("</body>", PROBE + "</body>"))
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
         f"--user-data-dir={tmp_path}/profile", f"--window-size={size}", "--enable-logging=stderr", "--dump-dom", *flags,
         f"file://{page}"], capture_output=True, text=True, timeout=HANG)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    told = re.search(r'data-told="([^"]*)"', done.stdout)
    assert told, done.stderr[-2000:]
    return json.loads(told[1].replace("&quot;", '"')), console, done.stdout


@pytest.mark.parametrize("size", ["1280,900", "500,900"], ids=["desktop", "phone"])
def test_every_chart_is_drawn_and_the_console_is_silent(trained, tmp_path, size):
    told, console, _ = look(trained.folder, tmp_path, size)
    assert console == [] and told["wider"] is False
    assert set(told["charts"]) == {f"chart-{name}" for name in
                                   ("loss", "learning_rate", "gradient_norm", "noise", "memory", "time")}
    for name, chart in told["charts"].items():
        # Axes and labels alone have some greys: the lines bring colours of their own.
        assert chart["colours"] > 20 and 200 < chart["width"] <= told["width"], name


def test_it_is_dark_where_the_reader_is_and_can_be_switched(trained, tmp_path):
    light = look(trained.folder, tmp_path, "1280,900")[0]
    dark = look(trained.folder, tmp_path, "1280,900", "--force-dark-mode", "--blink-settings=preferredColorScheme=0")[0]
    assert (light["theme"], light["other"]) == ("light", "dark")
    assert (dark["theme"], dark["other"]) == ("dark", "light")


def test_the_actions_of_the_guard_are_shown_with_their_reasons(stopped, tmp_path):
    _, console, dom = look(stopped.folder, tmp_path, "1280,900")
    assert console == [] and "Stopped by the guard: the run diverged at step" in dom
    for line in stopped.metrics:
        if not line["applied"]:
            assert f"<td>{line['step']}</td><td>refused</td>" in dom and line["reason"] in dom


def test_the_report_shows_which_batches_the_noise_suggests(trained, tmp_path):
    noise = trained.metrics[-1]["noise_batch"]
    _, _, dom = look(trained.folder, tmp_path, "1280,900")
    assert ("Batch sizes that the noise suggests" in dom) == (noise is not None)
    if noise is not None:
        assert f"<td>{math.ceil(10 * noise):,} or more</td>" in dom


def test_a_rewritten_report_has_the_same_content(run, stopped, tmp_path):
    folder = shutil.copytree(stopped.folder, run.folder / "copy")
    (folder / "report.html").unlink()
    run("report", "copy").ok()
    _, _, dom = look(folder, tmp_path, "1280,900")
    assert "Stopped by the guard: the run diverged at step" in dom
    (folder / "summary.json").write_text("{")
    run("report", "copy").refused(5, "summary.json")


def test_the_page_is_self_contained(trained):
    page = (trained.folder / "report.html").read_text()
    assert not re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?\s*(?:https?:)?//""", page)
    assert "{{" not in re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)


def test_report_writes_the_page_of_a_run_again(run, trained):
    folder = shutil.copytree(trained.folder, run.folder / "copy")
    (folder / "report.html").unlink()
    result = run("report", "copy").ok()
    assert "copy/report.html" in result.stdout and (folder / "report.html").stat().st_size > 50_000


def test_an_incomplete_last_line_of_the_log_is_ignored(run, trained):
    folder = shutil.copytree(trained.folder, run.folder / "copy")
    log = folder / "metrics.jsonl"
    log.write_text(log.read_text()[:-40])
    result = run("report", "copy").ok()
    assert "warning:" in result.stderr and "in the middle of a line" in result.stderr
    page = (folder / "report.html").read_text()
    assert '"step":[1,2,' in page and ",29]" in page


@pytest.mark.parametrize("change, words", [
    (None, ["is not a run"]), (lambda text: "", ["no steps"]), (lambda text: "x\n" + text, ["line 1"]),
    (lambda text: text[:50], ["no steps"]), (lambda text: text.replace('"loss":', '"lost":'), ["line 1"]),
    (lambda text: text.replace('"step":1,', '"step":1e99,'), ["line 1"]),
], ids=["no log", "empty", "no json", "half a line", "another key", "too large"])
def test_a_folder_that_is_not_a_run_is_bad_data(run, trained, change, words):
    folder = run.folder / "other"
    folder.mkdir()
    if change:
        (folder / "metrics.jsonl").write_text(change((trained.folder / "metrics.jsonl").read_text()))
    run("report", "other").refused(5, *words)
    assert not (folder / "report.html").exists()


def test_a_missing_run_is_bad_data(run, data):
    run("report", "nowhere").refused(5, "nowhere")
    run("report", data.text).refused(5, data.text.name)
    run("report").refused(2, "run")


def test_names_and_reasons_cannot_break_out_of_the_page(run, trained):
    folder = shutil.copytree(trained.folder, run.folder / "<b>&name")
    log = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    lines[3] |= {"applied": False, "reason": "</script><script>document.title='taken'</script>"}
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run("report", folder).ok()
    _, console, dom = look(folder, run.folder, "1280,900")
    assert console == [] and "<title>&lt;b&gt;&amp;name: gpt-tiny</title>" in dom
    assert "&lt;/script&gt;&lt;script&gt;" in dom


def test_tensorboard_reads_the_events(trained):
    python = ROOT / ".venv-test" / "bin" / "python"
    done = subprocess.run([python, "-c", READ_EVENTS, trained.folder], capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr[-2000:]
    read = json.loads(done.stdout)
    for tag, key in (("train/loss", "loss"), ("train/gradient_norm", "gradient_norm"), ("train/batch", "batch"),
                     ("train/learning_rate", "learning_rate"), ("memory/peak_bytes", "peak_bytes")):
        assert [step for step, _ in read[tag]] == trained.column("step")
        # Events hold single precision.
        assert [value for _, value in read[tag]] == pytest.approx(trained.column(key), rel=1e-6)
    assert len(read["noise/noise_batch"]) == sum(value is not None for value in trained.column("noise_batch"))
