"""Several runs of train.py, one after another, by the same processes: python several_runs.py '{"FOLDER": ["FLAG", ...], ...}'.

No test: it saves those of test_parallel.py the start of processes, which takes longer than their runs.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import train
from common import distributed

if __name__ == "__main__":
    world = distributed.setup()
    distributed.setup, distributed.cleanup = lambda: world, lambda: None
    for flags in json.loads(sys.argv[1]).values():
        train.main(train.make_parser().parse_args(flags))
