"""scripts/setup.sh for a user without rights to install, and on a machine where everything is installed."""

import os
import pathlib
import subprocess

ROOT = pathlib.Path(__file__).resolve().parent.parent


def run_setup(tmp_path, what, installed, root="1000"):
    """Runs the script with stand-ins for dpkg-query, id, sudo and apt-get; returns its result and what apt-get was told."""
    programs = {
        "dpkg-query": "printf installed" if installed else "exit 1",
        "id": f"echo {root}",
        "sudo": "exit 1",
        "apt-get": f'echo "$*" >> {tmp_path}/apt.log',
    }
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    result = subprocess.run(
        [str(ROOT / "scripts" / "setup.sh"), what],
        env={**os.environ, "PATH": path, "MICROBATCH_TORCH": "/somewhere"},
        capture_output=True, text=True, timeout=300)
    log = tmp_path / "apt.log"
    return result, log.read_text() if log.exists() else ""


def test_without_rights_it_lists_what_to_install_and_stops(tmp_path):
    result, installed = run_setup(tmp_path, "test", installed=False)
    assert result.returncode == 1 and not installed
    assert "apt-get install" in result.stderr
    for package in ("cmake", "ninja-build", "libcli11-dev", "libgtest-dev", "clang-format", "fortunes", "dataset-fashion-mnist"):
        assert package in result.stderr


def test_if_everything_is_installed_it_does_nothing(tmp_path):
    result, installed = run_setup(tmp_path, "test", installed=True)
    assert result.returncode == 0 and not installed and not result.stdout and not result.stderr


def test_as_root_it_installs_what_is_missing_and_only_that(tmp_path):
    result, installed = run_setup(tmp_path, "build", installed=False, root="0")
    assert result.returncode == 0
    assert "install -y --no-install-recommends cmake" in installed
    for package in ("libgtest-dev", "fortunes", "libbenchmark-dev"):
        assert package not in installed


def test_only_the_bench_installs_google_benchmark(tmp_path):
    for what in ("build", "demo", "bench", "test"):
        (tmp_path / what).mkdir()
        result, installed = run_setup(tmp_path / what, what, installed=False, root="0")
        assert result.returncode == 0 and ("libbenchmark-dev" in installed) == (what == "bench")


def test_a_wrong_argument_prints_the_usage(tmp_path):
    result, _ = run_setup(tmp_path, "everything", installed=True)
    assert result.returncode == 2 and "usage" in result.stderr


def test_a_named_libtorch_is_used_and_nothing_is_downloaded(tmp_path):
    # Without the two names this machine's .venv would be looked at; with one of them, python3 is not even called.
    for name in ("MICROBATCH_TORCH", "CMAKE_PREFIX_PATH"):
        folder = tmp_path / name
        (folder / "bin").mkdir(parents=True)
        (folder / "bin" / "python3").write_text(f"#!/bin/sh\ntouch {folder}/called\nexit 1\n")
        (folder / "bin" / "python3").chmod(0o755)
        torch = folder / "libtorch"
        (torch / "share" / "cmake" / "Torch").mkdir(parents=True)
        (torch / "share" / "cmake" / "Torch" / "TorchConfig.cmake").touch()
        environment = {"MICROBATCH_TORCH": "", "CMAKE_PREFIX_PATH": "", name: f"{torch}"}
        environment["PATH"] = f"{folder}/bin:{os.environ['PATH']}"
        run = subprocess.run([str(ROOT / "scripts" / "setup.sh"), "build"], env={**os.environ, **environment},
                             capture_output=True, text=True, timeout=300)
        assert run.returncode == 0 and not (folder / "called").exists()
