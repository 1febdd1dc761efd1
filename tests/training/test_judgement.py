"""What of the validation split is replayed."""

import numpy as np

from training.judgement import some_runs


def test_whole_runs_are_validated_evenly_spread() -> None:
    runs = np.stack([np.arange(24) * 5000, np.arange(1, 25) * 5000], axis=1)
    some = some_runs(runs, 65_000, 3)
    assert len(some) == 13 and (np.diff(some) == 5000).all() and {tuple(run) for run in some} <= {*map(tuple, runs)}
    assert set(np.diff(some[:, 0])) == {5000, 10_000} and some[-1, 1] == runs[-1, 1]
    assert some_runs(runs, 10**9, 3).tolist() == runs.tolist()
    assert some_runs(runs[:3], 12_000, 3).tolist() == [[0, 4000], [5000, 9000], [10_000, 14_000]]  # a long trace
