"""Links of the README and of docs/ lead somewhere."""

import re
from functools import cache
from urllib.parse import unquote

import pytest

from cli import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
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
