"""What Slurm says, understood: recorded jobs and nodes, and answers of another form."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_slurm import FORMS, JOBS, RECORDED, FakeSlurm, agent_for, as_in, plain, until
from hypothesis import given
from hypothesis import strategies as st

from deployment import priorities
from deployment.slurm import (
    FOREVER,
    NotUnderstood,
    Slurm,
    SlurmError,
    job_from_accounting,
    job_from_rest,
    number,
    processors_in_use,
    state_of,
)


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
    with pytest.raises(SlurmError, match=r"GET (/slurm/v0.0.38/)?nodes: "):
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
    with pytest.raises(SlurmError, match=f"POST /slurm/v0.0.38/job/1: HTTP {status}"):
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


@pytest.mark.parametrize("version", FORMS)
def test_jobs_of_every_version_are_the_same(version: str) -> None:
    jobs = {record["name"]: job_from_rest(record) for record in FORMS[version]["jobs"]["jobs"]}
    now = 1_795_233_575.0
    ended, running, pending = jobs["ended"], jobs["running"], jobs["pending"]
    assert (ended.start, ended.end, ended.ran, ended.cpus) == (now + 1, now + 61, True, 2)
    assert (running.state, running.start, running.cpus, running.limit) == ("RUNNING", now + 2, 4, 180.0)
    assert (pending.state, pending.start, pending.eligible, pending.nice) == ("PENDING", 0.0, now, 7)
    assert (pending.user, pending.account, pending.priority) == ("ann", "chem", 4_294_901_755)
    assert jobs["endless"].limit == jobs["unset"].limit == FOREVER
    assert [jobs[name].left_alone for name in ("held", "after", "tomorrow", "array")] == [
        "held", "dependency", "begin time", "",
    ]  # fmt: skip
    assert {name: jobs[name].state for name in ("completing", "waking", "again", "cancelled", "lost")} == {
        "completing": "COMPLETING", "waking": "CONFIGURING", "again": "PENDING", "cancelled": "CANCELLED",
        "lost": "NODE_FAIL",
    }  # fmt: skip
    assert not jobs["cancelled"].ran and jobs["lost"].ran


@pytest.mark.parametrize("version", FORMS)
def test_nodes_of_every_version_are_the_same(version: str) -> None:
    """Two in use, one idle, two asleep, one drained with three processors still taken; one down, one empty."""
    nodes = FORMS[version]["nodes"]["nodes"]
    assert processors_in_use(nodes, None) == processors_in_use(nodes, "main") == 4 * 5 + 3
    assert processors_in_use(nodes, "other") == 0


@pytest.mark.parametrize("version", FORMS)
def test_accounting_of_every_version_is_the_same(version: str) -> None:
    jobs = [job_from_accounting(record) for record in FORMS[version]["sacct"]["jobs"]]
    assert [job.state for job in jobs] == ["COMPLETED", "FAILED", "PENDING", "TIMEOUT"]
    assert [job.end - job.start for job in jobs if job.ran] == [60.0, 100.0, 90.0]
    assert [job.limit for job in jobs] == [180.0, 600.0, 180.0, FOREVER]
    assert [job.cpus for job in jobs] == [2, 4, 2, 1] and {job.user for job in jobs} == {"ann"}


@pytest.fixture(params=FORMS)
def other_slurm(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeSlurm]:
    monkeypatch.chdir(tmp_path)
    server = FakeSlurm(tmp_path / "restd.sock", request.param)
    yield server
    server.shutdown()
    server.server_close()


def test_the_agent_orders_the_jobs_of_every_version(other_slurm: FakeSlurm) -> None:
    """The newest version that is known; what has not changed is not taken for an empty queue; refusals are seen."""
    slurm = other_slurm
    slurm.add(1, cpus=16)
    slurm.add(2, cpus=1)
    slurm.add(3, priority=0)
    agent = agent_for(slurm)
    agent.one_pass()
    assert agent.slurm.version == slurm.form["api"] and agent.processors == 23
    assert slurm.by_priority() == [2, 1] and [job_id for job_id, _ in slurm.updates] == [2, 1]
    assert isinstance(slurm.updates[0][1]["priority"], int) == (slurm.form["api"] == 38)
    slurm.changed = time.time() - 3600
    agent.listed = time.time()
    agent.one_pass()
    assert slurm.listings == [200, 304] and len(slurm.updates) == 2
    assert agent.metrics.jobs.labels("pending")._value.get() == 2
    slurm.jobs[2]["job_state"] = as_in(slurm.pending["job_state"], "COMPLETED")  # between the listing and the update
    assert not agent.update(2, priority=5) and agent.metrics.refused._value.get() == 1


def test_a_version_is_found_without_the_page_that_names_them(other_slurm: FakeSlurm) -> None:
    other_slurm.openapi = 404, "Unable find requested URL."
    other_slurm.add(1)
    agent = agent_for(other_slurm)
    agent.one_pass()
    assert agent.slurm.version == other_slurm.form["api"] and len(other_slurm.updates) == 1


@pytest.mark.parametrize(
    ("offered", "taken"),
    [((36, 37, 38), 38), ((41, 42, 43, 44), 43), ((44, 45), 44), ((36, 37), None), ((), None)],
)
def test_the_newest_version_that_is_known_is_taken(
    slurm: FakeSlurm, offered: tuple[int, ...], taken: int | None
) -> None:
    slurm.openapi = 200, {"paths": {f"/slurm/v0.0.{v}/jobs/": {} for v in offered}}
    client = Slurm(Path(str(slurm.server_address)))
    if taken is None:
        have = ", ".join(f"v0.0.{v}" for v in offered) or "none"
        with pytest.raises(
            NotUnderstood, match=rf"^GET /openapi/v3: HTTP 200; this slurmrestd speaks {have} of Slurm's"
        ):
            client.jobs()
    else:
        slurm.api = f"/slurm/v0.0.{taken}"
        assert client.jobs() == [] and client.listings["jobs"] == f"/slurm/v0.0.{taken}/jobs/"


def test_another_slurm_at_the_same_place(slurm: FakeSlurm) -> None:
    """An upgrade while the agent runs: the first pass fails, the next one asks again."""
    slurm.add(1)
    agent = agent_for(slurm)
    agent.one_pass()
    slurm.form, slurm.api = FORMS["24.11"], "/slurm/v0.0.42"
    slurm.openapi, slurm.nodes, slurm.jobs = (200, slurm.form["openapi"]), slurm.form["nodes"]["nodes"], {}
    slurm.pending = next(job for job in slurm.form["jobs"]["jobs"] if job["name"] == "pending")
    slurm.add(7)
    agent.listed = agent.looked = 0.0
    with pytest.raises(NotUnderstood, match=r"^GET /slurm/v0.0.38/jobs: HTTP 404, 'Unable find requested URL"):
        agent.one_pass()
    agent.one_pass()
    assert agent.slurm.version == 42 and slurm.updates[-1][0] == 7


@pytest.mark.parametrize("what", ["404", "no JSON", "no jobs", "no record", "old"])
def test_an_agent_that_understands_nothing_ends(
    slurm: FakeSlurm, what: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After a minute (here: a third of a second), with what was asked, the status, and the version."""
    monkeypatch.setattr(priorities, "NOT_UNDERSTOOD", 0.3)
    slurm.add(1)
    said = {
        "404": r"GET /slurm/v0.0.43/jobs: HTTP 404, 'Unable find",
        "no JSON": r"GET /slurm/v0.0.38/jobs: HTTP 200, '<html>'",
        "no jobs": r"GET /slurm/v0.0.38/jobs: HTTP 200, an answer of another form, without a list of jobs",
        "no record": r"GET /slurm/v0.0.38/jobs: HTTP 200, and not one of 1 jobs is as expected",
        "old": r"GET /openapi/v3: HTTP 200; this slurmrestd speaks v0.0.36 of Slurm's REST API, and v0.0.38",
    }[what]
    if what in ("404", "old"):
        slurm.openapi = 200, {"paths": {f"/slurm/v0.0.{43 if what == '404' else 36}/jobs": {}}}
    if what == "no record":
        slurm.jobs = {1: {"job_id": 1}}
    if what in ("no JSON", "no jobs"):
        reply = slurm.RequestHandlerClass.reply  # type: ignore[attr-defined]
        answer = "<html>" if what == "no JSON" else {"errors": []}
        monkeypatch.setattr(
            slurm.RequestHandlerClass, "reply",
            lambda self, status, found: reply(self, status, answer if self.path.endswith("/jobs") else found),
        )  # fmt: skip
    agent = agent_for(slurm)
    with pytest.raises(NotUnderstood, match=said):
        agent.run(threading.Event())
    assert "next try in" in caplog.text


def test_a_slurm_that_is_down_is_waited_for(slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that says so is understood."""
    monkeypatch.setattr(priorities, "NOT_UNDERSTOOD", 0.0)
    slurm.slurmctld = False
    agent, stop = agent_for(slurm), threading.Event()
    running = threading.Thread(target=agent.run, args=(stop,))
    running.start()
    until(lambda: agent.metrics.failures._value.get() >= 2)
    assert running.is_alive()
    stop.set()
    running.join()


@given(
    value=st.one_of(st.none(), st.integers(0, 2**33)),
    infinite=st.booleans(),
    known=st.booleans(),
    state=st.sampled_from(["PENDING", "RUNNING", "COMPLETED"]),
    flags=st.lists(st.sampled_from(["REQUEUED", "STOPPED"])),
)
def test_numbers_and_states_in_all_their_forms(
    value: int | None, infinite: bool, known: bool, state: str, flags: list[str]
) -> None:
    written = {"set": known, "infinite": infinite, "number": value or 0}
    assert number(written) == (float(value or 0) if known and not infinite and (value or 0) < 0xFFFFFFFE else None)
    assert number(value) == (None if value is None or value >= 0xFFFFFFFE else float(value))
    assert state_of([*flags, state]) == state_of([state, *flags]) == state_of(state) == state
    assert plain(as_in(written, 3)) == 3


RECORDS = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**40) | st.sampled_from(["", "x", "PENDING", "RUNNING"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.fixed_dictionaries({"set": st.booleans(), "infinite": st.booleans(), "number": inner})
    ),
    max_leaves=3,
)


@given(data=st.data(), version=st.sampled_from(sorted(FORMS)))
def test_any_record_is_a_job_or_not_as_expected(data: st.DataObject, version: str) -> None:
    """Whatever stands in some of its fields: what the agent leaves alone are these errors."""
    record = dict(data.draw(st.sampled_from(FORMS[version]["jobs"]["jobs"])))
    for field in data.draw(st.lists(st.sampled_from(sorted(record)), max_size=3)):
        record[field] = data.draw(RECORDS)
    try:
        job = job_from_rest(record)
    except (AttributeError, KeyError, TypeError, ValueError):
        return
    assert isinstance(job.eligible, float) and isinstance(job.cpus, int) and job.limit != 0
