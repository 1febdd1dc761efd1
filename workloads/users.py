"""Users. Their jobs resemble each other (Tsafrir, Etsion & Feitelson, "Backfilling using system-generated predictions
rather than user runtime estimates", TPDS 18(6), 2007) and come in sessions (Zilber, Amit & Talby, "What is worth
learning from parallel workloads?", ICS 2005).
"""

import math

import numpy as np

from workloads.jobs import HOUR, MINUTE, Jobs

NUM_USERS, EXECUTABLES_EACH, USERS_PER_GROUP = 64, 4, 8
SESSION_JOBS, SESSION_OVERLAP = 8.0, 4.0
# Correlation of a job's rank in size and run time with what is typical of its executable.
SIZE_HABIT, RUN_HABIT = 0.98, 0.95
TYPED_TIMES = np.array(  # seconds: the requests that people type
    [1, 2, 5, 10, 20, 30, *(MINUTE * m for m in (1, 2, 5, 10, 15, 20, 30, 45))]
    + [HOUR * h for h in (1, 2, 3, 4, 6, 8, 10, 12, 18, 24, 36, 48, 72, 96, 120, 168)],
    float,
)


def jobs_of_users(
    rng: np.random.Generator, submit_time: np.ndarray, size: np.ndarray, demand: np.ndarray, run_time: np.ndarray
) -> Jobs:
    """Jobs at these times whose independent draws of (size, demand, run time) are handed to users of steady habits."""
    executable = sessions(rng, len(submit_time))
    draw = by_habit(rng, executable, size, run_time)
    user = executable // EXECUTABLES_EACH
    return Jobs(
        submit_time=submit_time,
        run_time=run_time[draw],
        requested_time=_typed_requests(rng, executable, run_time[draw]),
        demand=demand[draw],
        user=user.astype(np.int32),
        group=(user // USERS_PER_GROUP).astype(np.int32),
        executable=executable.astype(np.int32),
        queue=np.full(len(user), -1, np.int32),
        wait_time=np.zeros(len(user)),
        job_id=np.arange(1, len(user) + 1),
    )


def sessions(rng: np.random.Generator, num_jobs: int) -> np.ndarray:
    """int64[N]: the executable of each job in order of submission; executable // EXECUTABLES_EACH is its user.

    Users are active by Zipf's law, have a favourite executable, and run it several times in a row, a few at a time.
    """
    activity = 1 / np.arange(1, NUM_USERS + 1)
    user = rng.choice(NUM_USERS, size=num_jobs, p=activity / activity.sum())
    choice = np.minimum(rng.geometric(0.5, size=num_jobs), EXECUTABLES_EACH) - 1
    session = np.repeat(np.arange(num_jobs), rng.geometric(1 / SESSION_JOBS, size=num_jobs))[:num_jobs]
    overlap = np.argsort(np.arange(num_jobs) + rng.exponential(SESSION_OVERLAP, num_jobs))
    return (user * EXECUTABLES_EACH + choice)[session[overlap]]


def by_habit(rng: np.random.Generator, executable: np.ndarray, size: np.ndarray, run_time: np.ndarray) -> np.ndarray:
    """int64[N]: which draw of (size, run time) each job gets, so that an executable's jobs resemble each other.

    A permutation: the draws keep their distribution whatever the habits are, and with it the offered load. Each job
    has a rank it wishes for, mostly its executable's; sizes go by that rank, run times so among jobs of equal size.
    """

    def wish(habit: float) -> np.ndarray:
        typical = rng.normal(size=NUM_USERS * EXECUTABLES_EACH)
        return habit * typical[executable] + math.sqrt(1 - habit**2) * rng.normal(size=len(executable))

    own_size = np.empty_like(size)
    own_size[np.argsort(wish(SIZE_HABIT))] = np.sort(size)
    draw = np.empty(len(size), np.int64)
    draw[np.lexsort((wish(RUN_HABIT), own_size))] = np.lexsort((run_time, size))
    return draw


def _typed_requests(rng: np.random.Generator, executable: np.ndarray, run_time: np.ndarray) -> np.ndarray:
    """float64[N]: one round number for most jobs of an executable, well above its usual run time.

    Who knows that a job takes longer asks for more; one in four does not know.
    """
    order = np.lexsort((run_time, executable))
    _, first, kind, count = np.unique(executable[order], return_index=True, return_inverse=True, return_counts=True)
    usual = run_time[order][first + (0.9 * (count - 1)).astype(int)]
    typed = np.empty(len(run_time))
    typed[order] = _round_up(usual * np.exp(np.abs(rng.normal(0.0, 0.5, len(usual)))))[kind]
    unforeseen = rng.random(len(run_time)) < 0.25
    return np.where((run_time <= typed) | unforeseen, typed, _round_up(run_time))


def _round_up(seconds: np.ndarray) -> np.ndarray:
    slot = np.minimum(np.searchsorted(TYPED_TIMES, seconds), len(TYPED_TIMES) - 1)
    return np.maximum(TYPED_TIMES[slot], np.ceil(seconds))
