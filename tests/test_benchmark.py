import json
import subprocess
import sys

import pytest

from cli import ENV, ROOT, Result, one_line

BENCHMARK = [sys.executable, str(ROOT / "benchmarks" / "benchmark.py")]


def benchmark(*argv, timeout=300):
    done = subprocess.run([*BENCHMARK, *map(str, argv)], capture_output=True, text=True, timeout=timeout, env=ENV)
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.mark.slow
def test_a_quick_benchmark_writes_its_table(tmp_path):
    out = tmp_path / "benchmark.json"
    flags = ["--device", "cpu", "--quick", "--model", "SiT-T/8", "--batch-size", 2, "--only", "forward", "--out", out]
    done = benchmark(*flags)
    assert done.code == 0, done.err
    content = json.loads(out.read_text())
    assert content.keys() == {"machine", "settings", "peaks", "results"}
    assert content["machine"].keys() == {"device", "threads", "torch"}
    assert content["settings"]["model"] == "SiT-T/8" and content["settings"]["quick"]
    assert content["peaks"].keys() == {"fp32", "bf16"} and min(content["peaks"].values()) > 0
    plain, fast = content["results"]
    assert plain["setting"] == "eager float32" and plain["ratio"] == 1.0 and fast["setting"] == "bf16 + compile"
    keys = {"section", "setting", "turns", "seconds", "images_per_second", "share_of_peak", "memory_bytes", "ratio"}
    for row in (plain, fast):
        assert row.keys() == keys and row["section"] == "forward"
        assert row["images_per_second"] * row["seconds"] == pytest.approx(2)
        assert f"| {row['setting']}" in done.out


def test_wrong_flags_are_one_line(tmp_path):
    one_line(benchmark("--image-size", 100, "--out", tmp_path / "x.json"), 2, "--image-size 100", "multiple of 16")
    one_line(benchmark("--only", "everything"), 2, "--only")
    assert not list(tmp_path.iterdir())
