"""Hypothesis: the same examples in every run, and as many as two slow cores can take. Patience with W&B."""

import os
import signal
import sys
from pathlib import Path

from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parents[1]))  # the project's files, also where plain `pytest` is called
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C, and so do theirs

os.environ["WANDB__SERVICE_WAIT"] = "300"  # seconds: on busy cores its own process starts slowly

settings.register_profile(
    "deterministic",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("deterministic")
