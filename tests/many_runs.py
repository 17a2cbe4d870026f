"""Trains several configs in turn in the processes of one torchrun: `many_runs.py CONFIG KEY=VALUE ... -- ...`."""
import sys
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from perceiver import distributed  # noqa: E402
from perceiver.config import load_config  # noqa: E402
from perceiver.tasks import TASKS  # noqa: E402

with distributed.joined("auto") as ranks:
    for is_gap, args in groupby(sys.argv[1:], lambda arg: arg == "--"):
        if not is_gap:
            name, *overrides = args
            config = load_config(ROOT / "configs" / name, overrides, TASKS)
            assert train.train(config, ranks) == 0
