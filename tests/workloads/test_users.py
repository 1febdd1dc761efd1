"""Users have habits."""

import numpy as np
import pytest

from workloads.load import load_workload
from workloads.presets import PRESETS
from workloads.users import NUM_USERS, by_habit, sessions


@pytest.mark.parametrize("name", PRESETS)
def test_users_have_habits(name):
    jobs = load_workload(name, "validation", runs=1).jobs
    log_run = np.log(jobs.run_time)
    _, kind, count = np.unique(jobs.executable, return_inverse=True, return_counts=True)
    typical = np.bincount(kind, log_run) / count
    assert np.mean((log_run - typical[kind]) ** 2) < 0.35 * log_run.var()
    # Consecutive jobs often come from one session; were they independent, about one in forty would match.
    assert np.mean(jobs.executable[1:] == jobs.executable[:-1]) > 0.25
    assert np.bincount(jobs.user % NUM_USERS).max() > 0.1 * len(jobs)


def test_habits_only_hand_out_the_draws():
    rng = np.random.default_rng(5)
    draw = by_habit(rng, sessions(rng, 1_000), rng.integers(1, 9, 1_000), rng.random(1_000))
    assert sorted(draw.tolist()) == list(range(1_000))
