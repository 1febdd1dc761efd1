"""The batch jobs of Lublin & Feitelson, "The workload on parallel supercomputers: modeling the characteristics of rigid
jobs", JPDC 63(11), 2003. Constants and algorithm as in their lublin99.c (Parallel Workloads Archive).
"""

import math
from functools import cache

import numpy as np

from workloads.jobs import DAY, Jobs
from workloads.users import jobs_of_users

SERIAL_SHARE, POWER_OF_TWO_SHARE = 0.2927, 0.6686
# log2 of a parallel job's size is uniform in [LOW, med], or (one in eight) in [med, hi = log2 of the machine].
SIZE_LOW, SIZE_MED_BELOW_HI, SIZE_LOW_SHARE = 1.2, 2.5, 0.875
# (shape, scale) of the natural logarithms of the times, which are drawn again above the limit.
SHORT_RUN, LONG_RUN, LOG_RUN_LIMIT = (6.57, 0.823), (639.1, 0.0156), 12.0
SHORT_SHARE_SLOPE, SHORT_SHARE_AT_ZERO = -0.003, 0.6986
GAP, LOG_GAP_LIMIT = (6.0415 * 1.0519, 0.8531), 13.0
# Arrivals over the day: a gamma density over half hours that starts at the 11th and wraps around midnight.
DAY_CURVE, DAY_START, BUCKETS = (6.1271, 5.2740), 11, 48


def lublin_jobs(rng: np.random.Generator, num_jobs: int, max_procs: int = 256, load: float = 0.85) -> Jobs:
    """Batch jobs of the Lublin-Feitelson model with users, habits and estimates, which the model leaves open.

    Sizes and run times are the model's, handed to users by `jobs_of_users`. The gaps between arrivals are stretched so
    that the expected offered load on `max_procs` processors is `load`; a single run's own varies around it.
    """
    size = lublin_sizes(rng, num_jobs, max_procs)
    log_run = truncated_gamma(rng, *mixture(rng, size), LOG_RUN_LIMIT)
    run_time = np.maximum(1.0, np.floor(np.exp(log_run)))
    gap = np.exp(truncated_gamma(rng, np.full(num_jobs, GAP[0]), np.full(num_jobs, GAP[1]), LOG_GAP_LIMIT))
    stretch = lublin_mean_work(max_procs) / (max_procs * load) / _gamma_mean_exp(*GAP, LOG_GAP_LIMIT)[1]
    submit_time = np.floor(daily_clock(np.cumsum(gap * stretch)))
    return jobs_of_users(rng, submit_time, size, size[:, None], run_time)


def lublin_sizes(rng: np.random.Generator, num_jobs: int, max_procs: int) -> np.ndarray:
    """float64[N] processors; a machine that is no power of two cuts its largest jobs."""
    kind, stage, u = rng.random((3, num_jobs))
    high = math.log2(max_procs)
    medium = max(SIZE_LOW, high - SIZE_MED_BELOW_HI)
    log_size = np.where(stage < SIZE_LOW_SHARE, SIZE_LOW + (medium - SIZE_LOW) * u, medium + (high - medium) * u)
    log_size = np.where(kind <= SERIAL_SHARE + POWER_OF_TWO_SHARE, np.floor(log_size + 0.5), log_size)
    return np.where(kind <= SERIAL_SHARE, 1.0, np.minimum(np.floor(2**log_size + 0.5), max_procs))


def _short_share(size: np.ndarray) -> np.ndarray:
    return np.clip(SHORT_SHARE_SLOPE * size + SHORT_SHARE_AT_ZERO, 0.0, 1.0)


def mixture(rng: np.random.Generator, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shape and scale, float64[N] each, of the gamma that the logarithm of each job's run time is drawn from."""
    short = rng.random(len(size)) <= _short_share(size)
    return np.where(short, SHORT_RUN[0], LONG_RUN[0]), np.where(short, SHORT_RUN[1], LONG_RUN[1])


def truncated_gamma(rng: np.random.Generator, shape: np.ndarray, scale: np.ndarray, limit: float) -> np.ndarray:
    values = rng.gamma(shape, scale)
    while len(again := np.flatnonzero(values > limit)):
        values[again] = rng.gamma(shape[again], scale[again])
    return values


def _gamma_density(x: np.ndarray, shape: float, scale: float) -> np.ndarray:
    return np.exp((shape - 1) * np.log(x / scale) - x / scale - math.lgamma(shape)) / scale


@cache
def _gamma_mean_exp(shape: float, scale: float, limit: float) -> tuple[float, float]:
    """P(X <= limit) and E[exp X | X <= limit] of a gamma variable, by the midpoint rule."""
    step = limit / 20_000
    x = np.arange(step / 2, limit, step)
    mass = _gamma_density(x, shape, scale) * step
    return float(mass.sum()), float(mass @ np.exp(x) / mass.sum())


@cache
def lublin_mean_work(max_procs: int) -> float:
    """E[size * run time] of the model in processor seconds, to about 0.3 %: sizes sampled, run times integrated."""
    size = lublin_sizes(np.random.default_rng(0), 2**18, max_procs)
    (short_mass, short_mean), (long_mass, long_mean) = (
        _gamma_mean_exp(*g, LOG_RUN_LIMIT) for g in (SHORT_RUN, LONG_RUN)
    )
    short, long = _short_share(size) * short_mass, (1 - _short_share(size)) * long_mass
    return float((size * (short * short_mean + long * long_mean) / (short + long)).mean())


@cache
def daily_weights() -> np.ndarray:
    """float64[48]: the rate of arrivals in each half hour from midnight, over the mean rate."""
    fine = DAY_START - 0.5 + (np.arange(BUCKETS * 100) + 0.5) / 100
    weights = _gamma_density(fine, *DAY_CURVE).reshape(BUCKETS, 100).sum(axis=1)
    return np.roll(weights / weights.mean(), DAY_START - 1)


def daily_clock(seconds: np.ndarray) -> np.ndarray:
    """When the daily cycle has let pass as many arrivals as the mean rate does in so many seconds."""
    day, within = np.divmod(seconds, DAY)
    bucket = DAY / BUCKETS
    marks = np.concatenate(([0.0], np.cumsum(daily_weights()))) * bucket
    return day * DAY + np.interp(within, marks, np.arange(BUCKETS + 1) * bucket)
