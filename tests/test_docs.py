"""Links of the README and of docs/ lead somewhere, and docs/paper_to_code.md names what is there."""

import ast
import re
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest

from cli import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAPER = ROOT / "docs" / "paper_to_code.md"
ARXIV = re.compile(r"\b\d{4}\.\d{4,5}\b")
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def outside_blocks(text):
    """Markdown without its fenced blocks."""
    return re.sub(r"^ *(```|~~~).*?^ *\1[`~]*\s*?$", "", text, flags=re.M | re.S)


@cache
def anchors(page):
    """What GitHub calls the headings of a page: lower case, letters, digits, _ and - alone, spaces as -, and a number behind
    a name that is there already."""
    found = set()
    for heading in re.findall(r"^ {0,3}#{1,6}[ \t]+(.*?)(?:[ \t]+#+)?[ \t]*$", outside_blocks(page.read_text()), flags=re.M):
        shown = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        again = (f"{name}-{count}" for count in range(1, len(found) + 1))
        found.add(name if name not in found else next(other for other in again if other not in found))
    return found


def links(text):
    """Where a page's links and pictures lead, but for those to other sites."""
    code = r"(`+)(?!`)(?:(?!\n\s*\n).)*?(?<!`)\1(?!`)"  # within a paragraph; a link's text may be code too
    prose = re.sub(code, "``", outside_blocks(text), flags=re.S)
    targets = re.findall(r"\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)", prose)
    targets += re.findall(r"^ {0,3}\[[^\]]+\]:\s*(\S+)", prose, flags=re.M)
    targets += re.findall(r"<(?:a|img)\b[^>]*?\b(?:href|src)=\"([^\"]+)\"", prose)
    return [unquote(target) for target in targets if not re.match(r"[a-z]+:", target)]


def broken(page, target):
    """What is wrong with a link, or None."""
    path, _, anchor = target.partition("#")
    file = (page.parent / path).resolve() if path else page
    if not file.is_relative_to(ROOT.resolve()) or not file.exists():
        return f"{target}: there is no such file"
    if anchor and (file.suffix != ".md" or anchor not in anchors(file)):
        return f"{target}: {file.name} has no such heading"


@every_page
def test_links_lead_to_files_and_headings_that_are_there(page):
    assert [wrong for target in links(page.read_text()) if (wrong := broken(page, target))] == []


def test_headings_have_githubs_names(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A `b_c`, d & E\n## [Two](x.md) lines\n```\n# no heading\n```\n### Two lines ###\n## Two lines\n## w = 2 D\n"
    )
    assert anchors(page) == {"a-b_c-d--e", "two-lines", "two-lines-1", "two-lines-2", "w--2-d"}


def test_links_are_seen_wherever_they_stand():
    text = '[a](x.md#y) ![b](p.png "t") [`c`](c.py)\n[d]: d.md\n<img src="e.png"> [f](https://x.y)\n'
    assert links(text + "`[g](g.md)`\n```\n[h](h.md)\n```\n") == ["x.md#y", "p.png", "c.py", "d.md", "e.png"]


@cache
def names_of(file):
    """Functions, classes, constants, and methods and fields as Class.name, that a file defines. Nothing is imported."""

    def collect(body, prefix=""):
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield prefix + node.name
            if isinstance(node, ast.ClassDef):
                yield from collect(node.body, f"{prefix}{node.name}.")
            for target in getattr(node, "targets", [getattr(node, "target", None)] if isinstance(node, ast.AnnAssign) else []):
                yield from (prefix + part.id for part in ast.walk(target) if isinstance(part, ast.Name))

    return set(collect(ast.parse(file.read_text()).body))


def rows(text):
    """(line, {heading: cell}) of each row of a table that has a column "where" or "test"."""
    heads = None
    for number, line in enumerate(text.splitlines(), start=1):
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] if line.startswith("|") else []
        if not cells:
            heads = None
        elif heads is None:
            heads = cells
        elif {"where", "test"} & set(heads) and not set(line) <= set("|-: "):
            yield number, dict(zip(heads, cells, strict=True))


def wrong_in(cell, tests):
    """What of a cell, files each with names of what is in it, is not there."""
    file, named = None, True
    for label, target, name in re.findall(r"\[`([^`]+)`\]\(([^)]+)\)|`([^`]+)`", cell):
        if name:
            named = True
            if file is None or file.suffix != ".py" or not file.exists() or name not in names_of(file):
                yield f"`{name}` is not in {file and file.name}"
            if tests and not name.startswith("test_"):
                yield f"`{name}` is no test"
            continue
        if not named:
            yield f"{file.name} without a name of what is in it"
        file, named = ROOT / label, Path(label).suffix != ".py"
        if (PAPER.parent / target).resolve() != file.resolve():
            yield f"`{label}` leads to {target}"
        if tests and not label.startswith("tests/"):
            yield f"`{label}` is not among the tests"
    if file is None or not named:
        yield "no file, or no name of what is in it"


def test_what_the_page_of_the_paper_names_is_there():
    text = PAPER.read_text()
    found = list(rows(text))
    prose = re.findall(r"^(?!\|).*?(\[`[^`]+`\]\([^)]+\)(?:,?\s`[^`]+`)+)", text, flags=re.M)  # files with names, beside tables
    wrong = [what for part in prose for what in wrong_in(part, False)]
    wrong += [
        f"line {number}, {column}: {what}"
        for number, row in found
        for column in ("where", "test")
        for what in wrong_in(row.get(column, ""), column == "test")
    ]
    assert len(found) > 60 and len(prose) == 3 and wrong == []


def test_every_paper_that_the_code_cites_is_on_the_page():
    rooms = ("common", "data", "inference", "metrics", "training", "transport")
    files = [*ROOT.glob("[a-z]*.py"), *(file for room in rooms for file in (ROOT / room).rglob("*.py"))]
    cited = {number: file.name for file in files for number in ARXIV.findall(file.read_text())}
    there = ARXIV.findall(PAPER.read_text())
    assert "2401.08740" in cited and {number: file for number, file in cited.items() if number not in there} == {}
