"""What the README says of flags, files and numbers is so."""

import re

from cli import ROOT
from flag_tables import tables
from inference.presets import PRESETS

README = (ROOT / "README.md").read_text()


def test_flag_tables_are_those_of_the_parsers():
    assert tables() in README, "run scripts/flag_tables.py and put its output into README.md"


def test_every_flag_in_the_text_exists():
    known = set(re.findall(r"--[a-z][a-z0-9-]+", tables()))
    others = {"--nproc", "--nnodes", "--rdzv", "--max-restarts", "--standalone", "--help"}  # of torchrun
    others |= {"--repo-type", "--include", "--local-dir"}  # of hf
    said = set(re.findall(r"--[a-z][a-z0-9-]+", README)) - others
    assert said <= known, said - known


def test_every_file_in_the_text_exists():
    for name in re.findall(r"`((?:[\w-]+/)*[\w-]+\.(?:py|sbatch|txt|yml))`", README):
        produced = name in ("log.txt",)
        rooms = ("", "transport", "training", "inference", "data", "metrics", "common")
        assert produced or any((ROOT / room / name).exists() for room in rooms), name


def test_the_library_as_it_is_shown(trained):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    names = {}
    exec(re.sub(r'"demo/.*?"', repr(str(trained)), code).replace("num_steps=250", "num_steps=5"), names)
    assert names["images"].shape == (1, 32, 32, 3) and names["z"].shape == (1, 3, 32, 32) and len(names["frames"]) == 250


def test_presets_are_the_table():
    for name, preset in PRESETS.items():
        row = next(line for line in README.splitlines() if f"`{name}`" in line)
        for fid in preset.fid.values():
            assert f"{fid:.2f}" in row
