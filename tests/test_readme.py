"""What the README, and the pages in docs/, say of flags, files and numbers is so."""

import re
import shlex
from itertools import pairwise

import pytest

from cli import ROOT
from flag_tables import SCRIPTS, parser_of, tables
from inference.presets import PRESETS
from models import SiT_models

README, DOCS = ROOT / "README.md", ROOT / "docs"
PAPER = (DOCS / "paper_to_code.md").read_text()
# But change_one_idea.md, whose commands are run by a test of their own.
PAGES = [README, *sorted(path for path in DOCS.glob("*.md") if path.name != "change_one_idea.md")]
STARTS = r"(?:python |torchrun |sbatch |[A-Z_]+=\S+ )"


def test_flag_tables_are_those_of_the_parsers():
    assert tables() in (DOCS / "flags.md").read_text(), "run scripts/flag_tables.py --write"


def test_the_readme_is_for_the_first_minute():
    assert len(README.read_text().splitlines()) < 150


OTHERS = "nproc nnodes rdzv max-restarts standalone help"  # of torchrun
OTHERS += " repo-type include local-dir"  # of hf
OTHERS += " nodes gpus-per-node cpus-per-task signal"  # of Slurm
OTHERS += " device only quick processes rounds steps sde-steps"  # of benchmarks/


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_flag_in_the_text_exists(page):
    known = set(re.findall(r"--[a-z][a-z0-9-]+", tables())) | {f"--{name}" for name in OTHERS.split()}
    text = page.read_text()
    if page.name == "migrating.md":  # where the first column of tables has flags of other code
        text = re.sub(r"^\| .*? \| ", "", text, flags=re.M)
    said = set(re.findall(r"--[a-z][a-z0-9-]+", text))
    assert said <= known, said - known


def commands(text):
    """(script, its words) of each command line of SCRIPTS in a page: in blocks, fenced or indented, and within lines. What
    stands for something else ("...") is left out, and variables, as `F="..."` sets them, are put in."""
    text, setting = re.sub(r"[ \t]*\\\n\s*", " ", text), re.compile(r'^ *(\w+)="(--[^"]*)"', flags=re.M)
    variables, text = {name: value.split() for name, value in setting.findall(text)}, setting.sub("", text)
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.M | re.S) + re.findall(r"^    (.*)", text, flags=re.M)
    lines = "\n".join(blocks).splitlines() + re.findall(r"`([^`\n]*)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    for line in (line for line in lines if re.match(STARTS, line)):
        words = [word for each in shlex.split(line, comments=True) for word in variables.get(each.removeprefix("$"), [each])]
        scripts = [word.replace("slurm/train.sbatch", "train.py").removesuffix(".py") for word in words]
        if place := next((i for i, name in enumerate(scripts) if i and name in SCRIPTS), None):
            given = list(pairwise(words[place:]))
            yield scripts[place], [word for before, word in given if word != "..." or before in ("--ckpt", "--data-path")]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_command_lines_are_taken_by_the_parsers(page):
    for script, words in commands(page.read_text()):
        parser = parser_of(script)
        if "--data-path" not in words and script == "train":  # as where only a flag is spoken of
            words = ["--data-path", "photos", *words]
        parser.parse_args(words)


def test_the_calls_of_the_published_code(monkeypatch):
    """As docs/migrating.md shows them, with a small model."""
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "migrating.md").read_text(), flags=re.S)
    small = SiT_models["SiT-T/8"](input_size=32, num_classes=1000)
    monkeypatch.setitem(SiT_models, "SiT-XL/2", SiT_models["SiT-T/8"])
    monkeypatch.setattr("download.find_model", lambda name: small.state_dict())
    names = {}
    exec(code.replace("num_steps=126", "num_steps=3"), names)
    assert names["latents"].shape == (2, 4, 32, 32) and names["loss"].isfinite()


@pytest.mark.parametrize("page", [README, DOCS / "code.md", DOCS / "paper_to_code.md"], ids=lambda path: path.name)
def test_every_file_in_the_text_exists(page):
    for name in re.findall(r"`((?:[\w-]+/)*[\w-]+\.(?:py|sbatch|txt|yml|ipynb))`", page.read_text()):
        produced = name in ("log.txt",)
        rooms = ("", "transport", "training", "inference", "data", "metrics", "common")
        assert produced or any((ROOT / room / name).exists() for room in rooms), name


@pytest.mark.parametrize("page", [README, DOCS / "sampling.md"], ids=lambda path: path.name)
def test_the_library_as_it_is_shown(page, trained):
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S)
    names = {}
    exec(re.sub(r'"demo/.*?"', repr(str(trained)), code).replace("num_steps=250", "num_steps=5"), names)
    assert names["images"].shape == (1, 32, 32, 3) and len(names["frames"]) == 250 and names["bits"].shape == (1,)
    if page != README:
        assert names["z"].shape == (1, 3, 32, 32)


def test_every_page_with_python_is_run():
    """By the tests above, and by test_change_one_idea.py."""
    pages = {path.name for path in (README, *DOCS.glob("*.md")) if "```python" in path.read_text()}
    assert pages == {"README.md", "sampling.md", "migrating.md", "change_one_idea.md"}


@pytest.mark.parametrize("page", [DOCS / "evaluation.md", DOCS / "paper_to_code.md"], ids=lambda path: path.name)
def test_presets_are_the_table(page):
    for name, preset in PRESETS.items():
        row = next(line for line in page.read_text().splitlines() if f"`{name}`" in line)
        for fid in preset.fid.values():
            assert f"{fid:.2f}" in row
