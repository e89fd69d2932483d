import re

import yaml

from cli import ROOT


def test_the_two_lists_of_packages_are_the_same():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pip = [line for line in lines if line and not line.startswith("#")]
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert next(item["pip"] for item in conda if isinstance(item, dict)) == pip
    assert all(re.fullmatch(r"[a-z-]+>=[\d.]+", line) for line in pip)  # ranges: nobody's machine is pinned
