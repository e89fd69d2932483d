"""Published weights, by a Hub of our own: huggingface_hub's real client against a small server on this machine."""

import os
import subprocess
import sys

import pytest

from cli import ENV, ROOT, call, one_line
from common.errors import UsageError, UserError
from download import PUBLISHED, locate, published_name
from small_hub import COMMIT, small_hub

FILES = {"nyu-visionx/SiT-collections/SiT-B-2-256.pt": b"base", "someone/else/deep/folder/model.pt": b"theirs"}
FILES["nyu-visionx/SiT-collections/SiT-XL-2-256.pt"] = b"not the published one"


@pytest.fixture(scope="module")
def hub():
    with small_hub(FILES) as server:
        yield server


FIND = """
import sys
sys.path.insert(0, {root!r})
from common.errors import UserError
from download import locate
for name in sys.argv[1:]:
    try:
        print("FOUND", open(locate(name)).read())
    except UserError as error:
        print("ERROR", error)
"""


def find(folder, hub, *names, **env):
    """What locate says of each name, in a process whose Hub is hub and whose cache lies in folder."""
    settings = dict(HF_ENDPOINT=hub.url, HF_HOME=str(folder / "cache"), HF_HUB_OFFLINE="0") | env
    code = FIND.format(root=str(ROOT))
    done = subprocess.run(
        [sys.executable, "-c", code, *names], capture_output=True, text=True, cwd=folder, env=ENV | settings, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if line.startswith(("FOUND", "ERROR"))]


def test_files_are_downloaded_once_and_found_again_without_network(hub, tmp_path):
    names = ["SiT-B-2-256", "hub:someone/else/deep/folder/model.pt", f"hub:someone/else/deep/folder/model.pt@{COMMIT}"]
    assert find(tmp_path, hub, *names) == ["FOUND base", "FOUND theirs", "FOUND theirs"]
    assert [command for command, found in hub.asked if found].count("GET") == 2 and ("HEAD", "main") in hub.asked
    assert find(tmp_path, hub, *names, HF_HUB_OFFLINE="1") == ["FOUND base", "FOUND theirs", "FOUND theirs"]


def test_what_is_not_there_or_not_the_published_file_is_said(hub, tmp_path):
    names = ["SiT-L-2-256", "hub:someone/else/no.pt", "hub:someone/else/deep/folder/model.pt@gone", "SiT-XL-2-256x256.pt"]
    lacking, no_file, no_revision, other = find(tmp_path, hub, *names)
    assert "`hf download nyu-visionx/SiT-collections SiT-L-2-256.pt --local-dir pretrained_models`" in lacking
    assert f"copy SiT-L-2-256.pt into {tmp_path / 'pretrained_models'}" in lacking
    assert "`hf download someone/else no.pt --local-dir .`, and give the file as --ckpt" in no_file
    assert "--revision gone" in no_revision
    assert "is not the published file" in other and PUBLISHED["SiT-XL-2-256"].sha256 in other
    assert "is not the published file" in find(tmp_path, hub, "SiT-XL-2-256")[0]  # nor does it count as there


def test_without_network_it_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # which spares its retries
    for name in ("SiT-S-2-256", "SiT-S-2-256.pt"):
        with pytest.raises(UserError, match=r"--init SiT-S-2-256.*cannot download it .*hf download nyu-visionx"):
            locate(name, "--init")
    one_line(call(capsys, "sample", "ODE", "--model", "SiT-L/2"), 1, "SiT-L-2-256", "hf download")


def test_files_that_were_brought_by_hand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("pretrained_models")
    for file in ("SiT-XL-2-256x256.pt", "SiT-B-2-256.pt"):  # the first as it was called before
        (tmp_path / "pretrained_models" / file).touch()
        assert locate("SiT-XL-2-256" if "XL" in file else "SiT-B-2-256").name == file
    (tmp_path / "SiT-B-2-256").touch()
    assert str(locate("SiT-B-2-256")) == "SiT-B-2-256" and str(locate("nothing.pt")) == "nothing.pt"


def test_names():
    assert published_name() == "SiT-XL-2-256" and published_name("SiT-XL/2", 512) == "SiT-XL-2-512"
    assert published_name("SiT-S/2") == "SiT-S-2-256" and published_name(None, "256x256") == "SiT-XL-2-256"
    with pytest.raises(UsageError, match="no published weights of SiT-S/2 at 512 px; there are SiT-S/2 at 256 px, "):
        published_name("SiT-S/2", 512)
    for name in ("hub:model.pt", "hub:someone/model.pt", "hub:"):
        with pytest.raises(UsageError, match="is named hub:OWNER/NAME/FILE"):
            locate(name)
