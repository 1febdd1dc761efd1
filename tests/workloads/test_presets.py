"""The built-in workloads are what they say they are."""

import time
from dataclasses import fields

import numpy as np
import pytest
from oracles import same

import workloads.presets as presets_module
from workloads.jobs import offered_load
from workloads.load import load_workload
from workloads.presets import PRESETS
from workloads.users import TYPED_TIMES


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_presets_load_the_cluster_but_do_not_swamp_it(name, seed):
    for split, (runs, run_jobs) in presets_module.RUNS.items():
        workload = load_workload(name, split, seed=seed)
        assert workload.segments.tolist() == [[i * run_jobs, (i + 1) * run_jobs] for i in range(runs)]
        loads = [offered_load(workload.jobs[a:b], workload.cluster) for a, b in workload.segments]
        assert 0.7 < np.mean(loads) < 1.1


@pytest.mark.parametrize("name", PRESETS)
def test_preset_jobs_are_sound(name):
    workload = load_workload(name, runs=3, run_jobs=2_000)
    jobs, cluster = workload.jobs, workload.cluster
    assert (jobs.demand[:, None] <= cluster.capacity).all(axis=2).any(axis=1).all()
    assert (jobs.demand == np.round(jobs.demand)).all() and (jobs.demand.sum(axis=1) > 0).all()
    assert (jobs.run_time >= 1).all() and (jobs.requested_time >= 1).all()
    assert 0.95 < np.mean(jobs.requested_time >= jobs.run_time) < 1
    assert np.isin(jobs.requested_time, TYPED_TIMES).all()
    assert jobs.job_id.tolist() == list(range(1, 6_001))
    for a, b in workload.segments:
        assert (np.diff(jobs.submit_time[a:b]) >= 0).all() and jobs.submit_time[a] >= 0
        assert jobs.submit_time[a] < 0.2 * jobs.submit_time[b - 1]
    for owner in (jobs.user, jobs.group, jobs.executable):
        runs = [set(owner[a:b].tolist()) for a, b in workload.segments]
        assert not (runs[0] & runs[1] or runs[0] & runs[2] or runs[1] & runs[2])
    dtypes = {field.name: getattr(jobs, field.name).dtype for field in fields(jobs)}
    whole = dict.fromkeys(("user", "group", "executable", "queue"), np.int32) | {"job_id": np.int64}
    assert dtypes == {name: whole.get(name, np.float64) for name in dtypes}


@pytest.mark.parametrize("name", PRESETS)
def test_the_same_seed_gives_the_same_jobs_and_splits_share_none(name):
    first = load_workload(name, runs=2, run_jobs=500)
    assert same(first.jobs, load_workload(name, runs=2, run_jobs=500).jobs)
    assert same(first.jobs[:500], load_workload(name, runs=1, run_jobs=500).jobs)
    others = [load_workload(name, split, runs=2, run_jobs=500) for split in ("validation", "test")]
    others.append(load_workload(name, seed=1, runs=2, run_jobs=500))
    # Runs that share a random stream would share their gaps.
    gaps = [np.diff(w.jobs.submit_time[a:b])[:20].tolist() for w in (first, *others) for a, b in w.segments]
    assert len({tuple(gap) for gap in gaps}) == len(gaps)
    assert all(np.array_equal(first.cluster.capacity, other.cluster.capacity) for other in others)


def test_training_jobs_are_made_quickly():
    for name in PRESETS:
        started = time.process_time()
        assert len(load_workload(name).jobs) == 160_000
        assert time.process_time() - started < 3.0  # of this process, however busy the machine is
