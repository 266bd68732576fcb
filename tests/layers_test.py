"""The tree is the architecture: a room includes only itself and the rooms above it, and core has no torch."""

import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parent.parent
ROOMS = ["core", "runtime", "memory", "state", "model", "io", "data", "autograd", "ops", "optim", "step", "distributed", "run",
         "analysis", "models"]
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)


def includes(path):
    return INCLUDE.findall(path.read_text())


def sources(room, pattern="*"):
    return [p for p in (ROOT / "microbatch" / room).rglob(pattern) if p.suffix in (".h", ".cpp")]


def test_every_room_has_sources():
    assert sorted(p.name for p in (ROOT / "microbatch").iterdir() if p.is_dir()) == sorted(ROOMS)
    assert all(sources(room) for room in ROOMS)


def test_a_room_includes_only_rooms_above_it():
    wrong = []
    for level, room in enumerate(ROOMS):
        for source in sources(room):
            for include in includes(source):
                parts = include.split("/")
                if parts[0] == "cli" or (parts[0] == "microbatch" and parts[1] not in ROOMS[: level + 1]):
                    wrong.append(f"{source.relative_to(ROOT)} includes {include}")
    assert not wrong


def test_core_has_no_torch():
    torch = ("torch/", "ATen/", "c10/", "fmt/")
    assert not [(s.name, i) for s in sources("core") for i in includes(s) if i.startswith(torch)]


def test_no_public_header_pulls_in_all_of_torch():
    assert not [s.name for room in ROOMS for s in sources(room, "*.h") if "torch/torch.h" in includes(s)]


def test_the_library_never_prints_or_exits():
    forbidden = re.compile(r"std::cout|std::cerr|\bprintf\(|std::exit|\babort\(|fmt::print")
    assert not [s.name for room in ROOMS for s in sources(room) if forbidden.search(s.read_text())]


def test_every_header_of_the_umbrella_exists_and_compiles_on_its_own_path():
    umbrella = [i for i in includes(ROOT / "microbatch" / "microbatch.h")]
    assert umbrella and all((ROOT / include).exists() for include in umbrella)
