"""Runs every kernel once, so that what Numba keeps of it is there for the processes that come after.

    python tests/compile_kernels.py    # a minute the first time, then a second
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from deployment.service import Args, Service
from evaluation.lower_bound import lower_bound
from load import state_at
from policies import load_policy
from scheduler_env import SchedulerVectorEnv
from simulator.kernels import STATIC
from simulator.moment import Moment
from simulator.replay import simulate
from simulator.rules import parse_rule
from workloads.load import load_workload

workload = load_workload("cloud", "test", runs=1, run_jobs=60)
[schedule] = simulate(workload, "easy-sjf")
lower_bound(workload.jobs, workload.cluster, "latency")
with_rows = SchedulerVectorEnv(1, workload, num_jobs=10, warmup_jobs=10, followup_jobs=5, episodes_in_a_row=3)
with_rows.reset(seed=1)
for _ in range(60):
    with_rows.step(with_rows.rule_actions())
now = float(schedule.start_time.max())
Service(Args("easy-sjf")).decide(json.dumps(state_at(schedule, now, history=True)).encode())
