"""Offered load, and clusters that cannot be."""

import math
from dataclasses import replace

import numpy as np
import pytest
from oracles import random_jobs

from workloads.jobs import Cluster, WorkloadError, offered_load, scale_load


def test_offered_load_is_work_over_capacity_of_the_most_loaded_resource():
    jobs = replace(
        random_jobs(np.random.default_rng(0), 3),
        submit_time=np.array([10.0, 30.0, 110.0]),
        run_time=np.array([100.0, 20.0, 40.0]),
        demand=np.array([[1.0, 8.0], [2.0, 2.0], [4.0, 1.0]]),
    )
    cluster = Cluster(np.array([[4.0, 8.0], [4.0, 4.0]]), np.array([1.0, 0.5]), ("cpu", "memory"))
    # cpu: 100 + 40 + 160 = 300 over (4 + 2) * 100 s; memory: 800 + 40 + 40 = 880 over (8 + 2) * 100 s
    assert offered_load(jobs, cluster) == pytest.approx(0.88)
    assert offered_load(scale_load(jobs, 1.25), cluster) == pytest.approx(1.1)
    assert scale_load(jobs, 2.0).submit_time.tolist() == [10, 20, 60]
    assert offered_load(jobs[:1], cluster) == math.inf
    with pytest.raises(WorkloadError, match="give a positive number"):
        scale_load(jobs, 0.0)


@pytest.mark.parametrize(
    ("capacity", "speed", "resources", "message"),
    [
        (np.zeros((0, 1)), [], ("cpu",), "one row per node"),
        (np.ones((2, 1)), [1.0], ("cpu",), "one speed per node"),
        (np.ones((1, 2)), [1.0], ("cpu",), "one name per resource"),
        (np.ones((1, 1)), [0.0], ("cpu",), "a speed is not a positive number"),
        (np.ones((1, 1)), [math.nan], ("cpu",), "a speed is not a positive number"),
        (np.ones((1, 1)), [math.inf], ("cpu",), "a speed is not a positive number"),
        (np.full((1, 1), math.nan), [1.0], ("cpu",), "a capacity is negative or not a number"),
        (np.full((1, 1), -1.0), [1.0], ("cpu",), "a capacity is negative or not a number"),
        (np.zeros((1, 1)), [1.0], ("cpu",), "no capacity at all"),
        (np.array([[1.0, 0.0], [1.0, 0.0]]), [1.0, 1.0], ("cpu", "gpu"), "no capacity at all"),
    ],
)
def test_an_impossible_cluster_is_refused(capacity, speed, resources, message):
    with pytest.raises(WorkloadError, match=message):
        Cluster(capacity, np.array(speed), resources)
