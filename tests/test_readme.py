"""What the README, and the page that goes with it, say of flags, files and numbers is so."""

import re

import pytest

from cli import ROOT
from flag_tables import tables
from inference.presets import PRESETS

README = (ROOT / "README.md").read_text()
PAPER = (ROOT / "docs" / "paper_to_code.md").read_text()
both_pages = pytest.mark.parametrize("page", [README, PAPER], ids=["README.md", "paper_to_code.md"])


def test_flag_tables_are_those_of_the_parsers():
    assert tables() in README, "run scripts/flag_tables.py and put its output into README.md"


@both_pages
def test_every_flag_in_the_text_exists(page):
    known = set(re.findall(r"--[a-z][a-z0-9-]+", tables()))
    others = {"--nproc", "--nnodes", "--rdzv", "--max-restarts", "--standalone", "--help"}  # of torchrun
    others |= {"--repo-type", "--include", "--local-dir"}  # of hf
    said = set(re.findall(r"--[a-z][a-z0-9-]+", page)) - others
    assert said <= known, said - known


@both_pages
def test_every_file_in_the_text_exists(page):
    for name in re.findall(r"`((?:[\w-]+/)*[\w-]+\.(?:py|sbatch|txt|yml))`", page):
        produced = name in ("log.txt",)
        rooms = ("", "transport", "training", "inference", "data", "metrics", "common")
        assert produced or any((ROOT / room / name).exists() for room in rooms), name


def test_the_library_as_it_is_shown(trained):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    names = {}
    exec(re.sub(r'"demo/.*?"', repr(str(trained)), code).replace("num_steps=250", "num_steps=5"), names)
    assert names["images"].shape == (1, 32, 32, 3) and names["z"].shape == (1, 3, 32, 32) and len(names["frames"]) == 250


@both_pages
def test_presets_are_the_table(page):
    for name, preset in PRESETS.items():
        row = next(line for line in page.splitlines() if f"`{name}`" in line)
        for fid in preset.fid.values():
            assert f"{fid:.2f}" in row
