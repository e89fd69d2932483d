"""app.py on a command line: one line where it cannot start, and nothing imported that --help does not need."""

import socket
import subprocess
import sys
import tempfile

import pytest

from cli import ENV, ROOT, call, launch, one_line


def test_help_needs_neither_torch_nor_gradio():
    code = "import sys, app; app.make_parser().format_help(); print({'torch', 'gradio'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=60)
    assert done.stdout == "set()\n", done.stderr


def test_the_port_is_in_use(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        one_line(launch("app", "--ckpt", tmp_path / "none.pt", "--port", port), 1, f"--port {port}", "in use")


def test_a_host_that_is_none():
    one_line(launch("app", "--ckpt", "none.pt", "--host", "no.such.host.invalid"), 2, "--host no.such.host.invalid")


def test_without_gradio_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    result = call(capsys, "app", "--ckpt", "none.pt", "--port", free_port())
    one_line(result, 1, "pip install -r requirements-extra.txt")


def test_a_wrong_checkpoint_is_the_librarys_line(tmp_path, monkeypatch, capsys):
    pytest.importorskip("gradio")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_TEMP_DIR", "HF_HUB_DISABLE_TELEMETRY", "NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "")  # what the command sets goes with the test
    (tmp_path / "bad.pt").write_bytes(b"no checkpoint")
    one_line(call(capsys, "app", "--ckpt", tmp_path / "bad.pt", "--port", free_port()), 1, "bad.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.pt"]


def test_make_app_without_a_demo_says_so(tmp_path):
    argv = ["make", "app", f"DEMO={tmp_path}", f"VENV={tmp_path}/none"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode and "run make demo first" in done.stderr and not (tmp_path / "none").exists()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
