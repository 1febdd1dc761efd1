"""What Slurm says, understood: recorded jobs and nodes, and answers of another form."""

from typing import Any

import pytest
from fake_slurm import JOBS, RECORDED, FakeSlurm, agent_for

from deployment.slurm import FOREVER, SlurmError, job_from_rest, processors_in_use


def test_recorded_jobs_are_understood() -> None:
    """An array, one that depends, one that is held, one for tomorrow, others that wait, run, and have ended."""
    jobs = {job_id: job_from_rest(record) for job_id, record in JOBS.items()}
    named = {job.name: job for job in jobs.values()}
    assert named["after"].left_alone == "dependency" and named["held"].left_alone == "held"
    assert named["tomorrow"].left_alone == "begin time"
    assert named["array"].left_alone == "" and named["array"].state == "PENDING"
    assert (named["pending"].cpus, named["pending"].limit, named["pending"].nice) == (2, 180.0, 7)
    assert named["endless"].limit == FOREVER
    running, ended, cancelled = named["running"], named["ended"], named["cancelled"]
    assert running.state == "RUNNING" and running.start >= running.eligible and not running.ran
    assert ended.ran and ended.end - ended.start in (1, 2) and ended.user == "root"
    assert cancelled.state == "CANCELLED" and not cancelled.ran


def test_processors_of_nodes_that_take_jobs() -> None:
    nodes = RECORDED["nodes"]["nodes"]
    assert [node["cpus"] for node in nodes] == [4] * 4 and processors_in_use(nodes, None) == 16
    drained = [{**nodes[0], "state_flags": ["DRAIN"], "alloc_cpus": 3}, {**nodes[1], "state": "down", "alloc_cpus": 0}]
    drained += nodes[2:]
    assert processors_in_use(drained, None) == 3 + 0 + 8
    assert processors_in_use(nodes, "main") == 16 and processors_in_use(nodes, "other") == 0


def test_nodes_that_sleep_take_jobs() -> None:
    """The flags that Slurm 22.05 gives with SuspendProgram; one that is down, or drained, does not wake up."""
    node = RECORDED["nodes"]["nodes"][0] | {"state": "idle", "alloc_cpus": 0}
    for flags in (["POWERING_DOWN"], ["POWERED_DOWN"], ["NOT_RESPONDING", "POWERING_UP"]):
        assert processors_in_use([node | {"state_flags": flags}], None) == 4, flags
    down = node | {"state": "down", "state_flags": ["POWERED_DOWN", "NOT_RESPONDING"]}
    drained = node | {"state_flags": ["DRAIN", "POWERED_DOWN"]}
    silent = node | {"state_flags": ["NOT_RESPONDING"]}
    assert processors_in_use([down, drained, silent], None) == 0


@pytest.mark.parametrize("nodes", [[None], ["n1"], [{"state_flags": None}], [{"state_flags": [1]}], None])
def test_nodes_of_another_form_are_tried_again(slurm: FakeSlurm, nodes: Any) -> None:
    slurm.add(1)
    known, slurm.nodes = slurm.nodes, nodes
    agent = agent_for(slurm)
    with pytest.raises(SlurmError, match="GET nodes: "):
        agent.one_pass()
    slurm.nodes = known
    agent.one_pass()
    assert len(slurm.updates) == 1


@pytest.mark.parametrize(
    ("status", "errors"),
    [(200, ["held"]), (500, ["held"]), (500, None), (500, [{"error_number": None}]), (200, "held"), (200, [None])],
)
def test_errors_of_another_form_are_tried_again(slurm: FakeSlurm, status: int, errors: Any) -> None:
    slurm.add(1)
    slurm.update = lambda *_: (status, {"errors": errors})  # type: ignore[method-assign]
    agent = agent_for(slurm)
    with pytest.raises(SlurmError, match=f"POST /job/1: HTTP {status}"):
        agent.one_pass()
    del slurm.update
    agent.listed = 0.0
    agent.one_pass()
    assert len(slurm.updates) == 1


@pytest.mark.parametrize("answer", [{"errors": None}, {}, {"errors": [{"error_number": None}]}])
def test_an_update_without_an_error_is_one(slurm: FakeSlurm, answer: dict[str, Any]) -> None:
    slurm.add(1)
    slurm.update = lambda *_: (200, answer)  # type: ignore[method-assign]
    agent = agent_for(slurm)
    agent.one_pass()
    assert agent.metrics.updates._value.get() == 1


def test_a_job_that_is_no_object_is_left_alone(slurm: FakeSlurm, caplog: pytest.LogCaptureFixture) -> None:
    slurm.add(1)
    slurm.jobs[2] = "x"  # type: ignore[assignment]
    agent_for(slurm).one_pass()
    assert len(slurm.updates) == 1 and "not as expected" in caplog.text


def test_names_are_any_bytes(slurm: FakeSlurm) -> None:
    slurm.add(1, name=b"Gr\xf6\xdfe".decode(errors="surrogateescape"))
    agent_for(slurm).one_pass()
    assert [job_id for job_id, _ in slurm.updates] == [1]
