import subprocess
import sys

import torch

from cli import ENV, ROOT
from common.distributed import World

SLOW_PEER = """
import sys, time
sys.path.insert(0, {root!r})
from common import distributed
world = distributed.setup()
world.barrier()
began = time.perf_counter()
if not world.is_main:
    time.sleep(1)
heard = world.max_later([3, 7][world.rank])
begun = time.perf_counter() - began
largest = heard()
print(f"\\nRANK {{world.rank}} {{begun < 0.5}} {{largest}} {{time.perf_counter() - began > 0.5}}", flush=True)
distributed.cleanup()
"""


def test_a_message_travels_while_its_sender_goes_on(tmp_path):
    """The main process says its word to one that is a second late, is not held up by that, and hears the largest."""
    (tmp_path / "slow_peer.py").write_text(SLOW_PEER.format(root=str(ROOT)))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*launcher, tmp_path / "slow_peer.py"], capture_output=True, text=True, env=ENV)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("RANK")]
    assert sorted(lines) == ["RANK 0 True 7 True", "RANK 1 False 7 True"], done.stdout


def test_a_process_alone_hears_itself():
    assert World(0, 1, torch.device("cpu")).max_later(5)() == 5
