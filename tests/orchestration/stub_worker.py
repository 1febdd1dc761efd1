"""A worker whose trainer and comparison are the stubs: python stub_worker.py worker --trainings 2

REAL_TRAINER: with the real trainer and comparison instead.
STUB_SILENCE: so many seconds without a heartbeat, and it is taken for dead.
"""

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
import training_loop  # noqa: E402
from orchestration import children, config  # noqa: E402

if "REAL_TRAINER" not in os.environ:
    children.COMMANDS |= {
        "ppo": [str(HERE / "stub_trainer.py")], "dqn": [str(HERE / "stub_trainer.py")],
        "compare": [str(HERE / "stub_compare.py")],
    }  # fmt: skip
config.SILENCE = float(os.environ.get("STUB_SILENCE", config.SILENCE))

if __name__ == "__main__":
    training_loop.main()
