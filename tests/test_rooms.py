"""The plan of the house: what may import what, and how long a file or a function may be."""

import ast
import re
import subprocess

import pytest

from cli import ROOT

# From the ground up: a module imports from its own floor, its own room, and from below.
FLOORS = [
    {"transport", "models"},
    {"common"},
    {"download"},
    {"data", "metrics"},
    {"inference"},
    {"training", "page"},
    {"train_utils"},
    {"sample_utils"},
    {"experiments"},
    {"train", "sample", "sample_ddp", "evaluate", "encode_latents", "export"}
    | {"measure_loss", "reconstruct_ema", "sweep", "app"},
]
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}
LISTED = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True).stdout.split()
FILES = [name for name in LISTED if not name.startswith(("tests/", "benchmarks/", "scripts/"))]


def imports(tree):
    """Names of the rooms, or files at the root, that a module imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("name", FILES)
def test_arrows_point_down(name):
    own = name.removesuffix(".py").split("/")[0]
    tree = ast.parse((ROOT / name).read_text())
    above = {other for other in imports(tree) if other in LEVEL and other != own and LEVEL[other] >= LEVEL[own]}
    assert own in LEVEL and not above - ({"train_utils"} if own == "sample_utils" else set())


def test_there_is_no_circle_inside_a_room():
    graph = {}
    for name in FILES:
        if "/" in name:
            room, own = name.removesuffix(".py").rsplit("/", 1)
            tree = ast.parse((ROOT / name).read_text()).body  # at import; what is inside a function comes later
            graph[f"{room}.{own}"] = {
                f"{room}.{node.module}" for node in tree if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module
            }
    while free := [name for name, needs in graph.items() if not needs & graph.keys()]:
        for name in free:
            del graph[name]
    assert not graph


@pytest.mark.parametrize("name", FILES)
def test_files_and_functions_are_short(name):
    text = (ROOT / name).read_text()
    assert len(text.splitlines()) <= (350 if name == "models.py" else 250)
    long = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef) and n.end_lineno - n.lineno >= 60]
    assert not [f"{node.name}: {node.end_lineno - node.lineno + 1} lines" for node in long]


def test_namespaces_of_flags_stay_in_the_commands():
    for name in FILES:
        if name.split("/")[0] in ("transport", "models.py", "common", "data", "metrics", "inference", "training"):
            assert not re.search(r"\bargs\.", (ROOT / name).read_text()), name


def test_the_root_holds_commands_and_what_a_reader_opens_first():
    assert len([name for name in FILES if "/" not in name]) <= 14
