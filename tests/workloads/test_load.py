"""A workload by the name of a preset or the path of a trace, and its splits."""

import numpy as np
import pytest
from places import SMALL

from workloads.jobs import WorkloadError
from workloads.load import load_workload
from workloads.users import NUM_USERS


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(WorkloadError, match=r"^nope\.swf: no such file or preset; the presets are cloud, hpc, "):
        load_workload("nope.swf")
    with pytest.raises(WorkloadError, match="Is a directory; give the path of an SWF trace"):
        load_workload(str(tmp_path))
    with pytest.raises(WorkloadError, match="unknown split 'tset'; use one of train, validation, test, all"):
        load_workload("cloud", "tset")


def test_a_trace_is_split_by_order_of_submission():
    splits = {split: load_workload(str(SMALL), split) for split in ("train", "validation", "test", "all")}
    assert {name: workload.segments.tolist() for name, workload in splits.items()} == {
        "train": [[0, 1800]],
        "validation": [[1800, 2100]],
        "test": [[2100, 3000]],
        "all": [[0, 3000]],
    }
    assert all(len(workload.jobs) == 3000 for workload in splits.values())  # the past is there as well


def test_all_of_a_preset_is_its_three_splits():
    everything = load_workload("cloud", "all", runs=2, run_jobs=100)
    parts = [load_workload("cloud", split, runs=2, run_jobs=100) for split in ("train", "validation", "test")]
    assert np.array_equal(everything.jobs.submit_time, np.concatenate([part.jobs.submit_time for part in parts]))
    assert len(everything.segments) == 6 and len(np.unique(everything.jobs.user // NUM_USERS)) == 6
