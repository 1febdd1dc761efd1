"""The work behind `benchmark.py`: comparisons with intervals, reports, a published table, speed, sweeps."""

import os

os.environ.setdefault("MPLBACKEND", "agg")  # before anything imports matplotlib: plots are files, no screen is needed
