import importlib
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from cli import ENV, ROOT, Result, one_line


def benchmark(*argv, script="benchmark", timeout=300):
    command = [sys.executable, str(ROOT / "benchmarks" / f"{script}.py"), *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=ENV)
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


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu")


@pytest.mark.slow
@pytest.mark.alone
def test_the_gpu_benchmark_in_miniature_adds_each_run_to_its_file(gpu, tmp_path):
    out = tmp_path / "new" / "gpu.json"
    flags = ["--quick", "--device", "cpu", "--out", out]
    done = benchmark(*flags, script="gpu", timeout=900)
    assert done.code == 0, done.err
    (run,) = json.loads(out.read_text())["runs"]
    assert list(run["items"]) == list(gpu.LIMITS) and run["quick"] and "torch" in run["machine"]
    table = out.with_suffix(".md").read_text()
    for name, item in run["items"].items():
        assert item["ended"] == "done" and item["rows"] and f"## {name}\n" in table, (name, item)
        for row in item["rows"]:
            assert f"| {row['setting']} | " in table and all(value >= 0 for value in row["figures"].values())
    assert table in done.out
    assert benchmark(*flags, "--only", "peaks", script="gpu").code == 0
    first, second = json.loads(out.read_text())["runs"]
    assert first == run and list(second["items"]) == ["peaks"]
    assert sorted(path.name for path in out.parent.iterdir()) == ["gpu.json", "gpu.md"]


def test_it_takes_less_than_twenty_minutes_on_one_gpu(gpu):
    assert sum(gpu.LIMITS.values()) - gpu.LIMITS["shards"] <= 20 * 60 and gpu.items().keys() == gpu.LIMITS.keys()


def test_an_item_that_hangs_or_fails_costs_no_other(gpu, monkeypatch, capsys, tmp_path):
    args = SimpleNamespace(device="cpu", quick=True, out=tmp_path / "gpu.json")
    monkeypatch.setitem(gpu.LIMITS, "peaks", 0.3)  # in which nothing has been imported
    item = gpu.do_in_process("peaks", args)
    assert item["ended"] == "stopped at its limit of 0.3 s" and item["seconds"] < 5 and item["rows"] == []
    args.device = "tpu"
    item = gpu.do_in_process("manifold", args)
    assert item["ended"].startswith("failed: gpu.py: error: argument --device") and "tpu" in capsys.readouterr().err
    measured = dict(machine="here", date="today", quick=True, items={"manifold": item})
    assert "failed: gpu.py: error" in gpu.tables(measured) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ended_by_a_signal_it_leaves_no_process(number, tmp_path):
    flags = ["--quick", "--device", "cpu", "--out", str(tmp_path / "gpu.json")]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *flags], stdout=subprocess.PIPE, text=True, env=ENV
    )
    assert "peaks (1 of" in process.stdout.readline()
    while not (child := subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()):
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(timeout=60) == 128 + number
    assert not any(os.path.exists(f"/proc/{pid}") for pid in child) and not list(tmp_path.iterdir())


def test_wrong_flags_of_the_gpu_benchmark_are_one_line(tmp_path):
    one_line(benchmark(script="gpu"), 2, "--device cuda", "--quick --device cpu")
    (tmp_path / "gpu.json").write_text("[]")
    one_line(benchmark("--device", "cpu", "--out", tmp_path / "gpu.json", script="gpu"), 1, tmp_path / "gpu.json")
    assert (tmp_path / "gpu.json").read_text() == "[]"
