"""What a job may still take, by what finished jobs did with their requests.

    from simulator.run_times import RunTimes
    known = RunTimes(problem)
    known.learn(finished)
    p10, p50, p90 = known.quantiles(jobs, elapsed, [0.1, 0.5, 0.9]).T

Users ask for about the same, and take about the same share of it, again and again (Tsafrir, Etsion & Feitelson 2007).
So the distribution is an empirical one: the ratios of run time to request of the last eight jobs of the same user with
the same request (fewer than three: of the user), and with the weight of two more those of everybody's last 256, as far
as they say that the job still runs.
"""

from collections.abc import Sequence

import numpy as np

from simulator.kernels import KEPT, RECENT, Known, Problem, learn_all, run_times_at
from workloads.jobs import Jobs

SHARES = 256  # at which a distribution is looked at for its quantiles


class RunTimes:
    """The distributions of the run times of a problem's jobs, given what has finished so far.

    Attributes:
        known: what kernels take.
    """

    def __init__(self, problem: Problem) -> None:
        count = int(problem.groups.max(initial=-1)) + 1
        self.problem = problem
        self.known = Known(
            ratio=np.zeros((count, KEPT)), count=np.zeros(count, np.int64),
            ring=np.zeros(RECENT), ordered=np.zeros(RECENT), seen=np.zeros(1, np.int64),
        )  # fmt: skip

    def learn(self, jobs: Sequence[int] | np.ndarray) -> None:
        """These jobs of the problem have finished, in this order."""
        learn_all(self.problem, self.known, np.asarray(jobs, np.int64))

    def at(self, jobs: np.ndarray, elapsed: np.ndarray, shares: np.ndarray) -> np.ndarray:
        """float64[J, S]: of int[J] jobs that have run for float64[J] seconds the run times (seconds, at speed 1) at
        float64[S] shares, 0 to 1, of those that are possible, in no order: a uniform share draws one."""
        found = np.empty((len(jobs), len(shares)))
        run_times_at(self.problem, self.known, np.asarray(jobs), np.asarray(elapsed), np.asarray(shares), found)
        return found

    def quantiles(self, jobs: np.ndarray, elapsed: np.ndarray, levels: Sequence[float]) -> np.ndarray:
        """float64[J, L]: quantiles of the run times of int[J] jobs that have run for float64[J] seconds."""
        found = self.at(jobs, elapsed, (np.arange(SHARES) + 0.5) / SHARES)
        return np.quantile(found, levels, axis=1, method="inverted_cdf").T


def ended_before(jobs: Jobs, first: int) -> np.ndarray:
    """int64[...]: of the jobs before number `first` those that had ended when it was submitted, in order of their ends,
    which are the recorded ones (where no wait was recorded: submit + run)."""
    end = (jobs.submit_time + jobs.wait_time + jobs.run_time)[:first]
    order = np.argsort(end, kind="stable")
    return order[end[order] <= jobs.submit_time[first]]
