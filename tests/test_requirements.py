import re

import yaml

from cli import ROOT

RANGE = r"[a-z-]+>=[\d.]+"  # nobody's machine is pinned


def packages(name):
    return [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]


def test_the_two_lists_of_packages_are_the_same():
    pip = packages("requirements.txt")
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert next(item["pip"] for item in conda if isinstance(item, dict)) == pip
    assert all(re.fullmatch(RANGE, line) for line in pip)


def test_extras_are_not_among_what_everybody_needs():
    extra = packages("requirements-extra.txt")
    assert all(re.fullmatch(RANGE, line) for line in extra) and not set(extra) & set(packages("requirements.txt"))
