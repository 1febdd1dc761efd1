"""The Lublin-Feitelson model against its published distributions."""

import math

import numpy as np
import pytest

from workloads.jobs import offered_load
from workloads.lublin import (
    LOG_RUN_LIMIT,
    daily_clock,
    daily_weights,
    lublin_jobs,
    lublin_mean_work,
    lublin_sizes,
    mixture,
    truncated_gamma,
)
from workloads.presets import hpc


def test_lublin_sizes_and_run_times_follow_the_published_distributions():
    jobs = lublin_jobs(np.random.default_rng(1), 100_000, max_procs=256)
    size, log_run = jobs.demand[:, 0], np.log(jobs.run_time)
    assert size.max() == 256 and (size >= 1).all()
    assert np.mean(size == 1) == pytest.approx(0.2927, abs=0.005)
    # beside the chosen ones a few others hit a power of two by rounding
    assert np.mean(np.log2(size) % 1 == 0) == pytest.approx(0.2927 + 0.6686 + 0.006, abs=0.004)
    # log2 of a parallel size: 7/8 in [1.2, 5.5], 1/8 in [5.5, 8]
    assert np.log2(size[size > 1]).mean() == pytest.approx(0.875 * 3.35 + 0.125 * 6.75, abs=0.03)
    # serial jobs: 69.56 % gamma(6.57, .823), cut at 12, else gamma(639.1, .0156); larger jobs run longer
    assert log_run[size == 1].mean() == pytest.approx(0.6956 * 5.36 + 0.3044 * 9.97, abs=0.05)
    assert log_run[size >= 128].mean() > log_run[size == 1].mean() + 1
    assert jobs.run_time.max() <= math.exp(12)


def test_lublin_work_is_integrated_correctly():
    rng = np.random.default_rng(2)
    size = lublin_sizes(rng, 1_000_000, 256)
    run_time = np.exp(truncated_gamma(rng, *mixture(rng, size), LOG_RUN_LIMIT))
    assert lublin_mean_work(256) == pytest.approx((size * run_time).mean(), rel=0.015)


def test_the_daily_clock_spends_points_like_lublin99():
    """The published algorithm, one bucket at a time: a job's points pay for half hours until they do not suffice."""
    weights, gaps = daily_weights(), np.random.default_rng(3).lognormal(5, 2, 500)
    bucket, points, passed, expected = 0, 0.0, 0.0, []
    for gap in gaps:
        points += gap / 1800
        while points > weights[bucket % 48]:
            points -= weights[bucket % 48]
            bucket, passed = bucket + 1, passed + 1800
        expected.append(passed + 1800 * points / weights[bucket % 48])
    assert np.allclose(daily_clock(np.cumsum(gaps)), expected)


def test_arrivals_follow_the_hours_of_the_day():
    weights = daily_weights()
    # The gamma density peaks at (6.1271 - 1) * 5.2740 = 27.04 half hours, counted from 1; the day turns at the 11th.
    assert (weights.sum(), weights.argmax(), weights.argmin()) == (pytest.approx(48), 26, 9)
    times = lublin_jobs(np.random.default_rng(4), 200_000).submit_time
    counts = np.bincount((times % 86_400 // 1_800).astype(int), minlength=48)
    assert np.corrcoef(counts, weights)[0, 1] > 0.97


@pytest.mark.parametrize("load", [0.6, 0.9])
def test_lublin_load_is_exact_in_expectation_and_varies_between_runs(load):
    cluster = hpc().cluster
    loads = [offered_load(lublin_jobs(np.random.default_rng(run), 5_000, load=load), cluster) for run in range(80)]
    assert np.mean(loads) == pytest.approx(load, rel=0.04)
    assert 0.04 < np.std(loads) / load < 0.2
