"""Runs every kernel once, so that what Numba keeps of it is there for the processes that come after.

python tests/compile_kernels.py    # a minute the first time, then a second
"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from load import state_at

from deployment.service import Args, Service
from evaluation.lower_bound import lower_bound
from scheduler_env import SchedulerVectorEnv
from simulator.replay import simulate
from workloads.load import load_workload

workload = load_workload("cloud", "test", runs=1, run_jobs=60)
[schedule] = simulate(workload, "easy-sjf")
lower_bound(workload.jobs, workload.cluster, "latency")
envs = SchedulerVectorEnv(1, workload, num_jobs=10, warmup_jobs=10, followup_jobs=5, episodes_in_a_row=3)
envs.reset(seed=1)
for _ in range(60):  # until one episode begins where another ended
    envs.step(envs.rule_actions())
busy = float(np.median(schedule.start_time))
Service(Args("easy-sjf")).decide(json.dumps(state_at(schedule, busy, history=True)).encode())
