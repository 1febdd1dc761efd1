"""Jobs for any cluster: they fit it and load it as asked."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workloads.generated import arrival_times, generate_cluster, generate_jobs
from workloads.jobs import DAY, WorkloadError, offered_load
from workloads.presets import cloud


@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 50),
    nodes=st.integers(1, 9),
    resources=st.integers(1, 3),
    arrivals=st.sampled_from(["poisson", "bursty", "daily"]),
)
@settings(max_examples=60)
def test_jobs_for_any_cluster_fit_it(seed, count, nodes, resources, arrivals):
    rng = np.random.default_rng(seed)
    cluster = generate_cluster(rng, nodes, ("cpu", "memory", "gpu")[:resources])
    jobs = generate_jobs(rng, count, cluster, arrivals=arrivals)
    assert cluster.capacity.shape == (nodes, resources) and jobs.demand.shape == (count, resources)
    assert (jobs.demand[:, None] <= cluster.capacity).all(axis=2).any(axis=1).all() and (jobs.demand >= 1).all()
    assert (np.diff(jobs.submit_time) >= 0).all() and (jobs.run_time >= 1).all()


@pytest.mark.parametrize("arrivals", ["poisson", "bursty", "daily"])
def test_generated_load_is_exact_in_expectation(arrivals):
    # Each run lasts some weeks, so that a part of a day at its end does not matter.
    cluster, long = cloud().cluster, (6_000.0, 1.2, DAY)
    make = partial(generate_jobs, num_jobs=10_000, cluster=cluster, run_time=long, arrivals=arrivals)
    loads = [offered_load(make(np.random.default_rng(run)), cluster) for run in range(40)]
    assert np.mean(loads) == pytest.approx(0.85, rel=0.03)


def test_bursts_are_bursty():
    """The arrivals of 100 mean gaps vary far more than the Poisson process's 100."""
    rng = np.random.default_rng(6)
    for kind, low, high in (("poisson", 0.8, 1.2), ("bursty", 10, 100)):
        counts = np.bincount((arrival_times(rng, 100_000, kind, 1.0) // 100).astype(int))[:-1]
        assert low < counts.var() / counts.mean() < high


def test_a_flavour_that_fits_no_node_is_refused():
    with pytest.raises(WorkloadError, match="larger than any node"):
        generate_jobs(np.random.default_rng(0), 5, cloud().cluster, flavours=[[64, 300]])
