"""Settings, promotions and rollbacks by hand, of a loop that runs: a bad one is refused and changes nothing."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
from orchestration_helpers import SMALL, Running, Site, Temporal, eventually
from temporalio.client import WorkflowUpdateFailedError

from orchestration.config import Champion, Settings, TrainingConfig


@pytest.fixture(scope="module")
def waiting(temporal: Temporal, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A loop with two rounds done, the second one promoted over the first, that waits."""
    site = Site(tmp_path_factory.mktemp("waiting"), temporal)
    site.worker()
    loop = Running(site, replace(SMALL, rounds=0, interval=0.0))
    eventually(lambda: loop.status().loop.done >= 1)
    loop.tell("pause")
    loop.until("paused")
    yield loop
    loop.close()
    site.close()


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"candidates": "0"}, "candidates 0: give 1 or more"),
        ({"candidates": "two"}, "candidates 'two': give a number without fraction"),
        ({"objective": "joy"}, "objective 'joy': give one of latency, wait, slowdown"),
        ({"candidates": "2", "colour": "red"}, "colour: no setting that can be changed"),
        ({"store": "elsewhere"}, "store: no setting that can be changed"),
        ({"training_flags": "--seed 3"}, "training_flags --seed: the loop gives this one itself"),
    ],
)
def test_a_bad_configuration_is_refused_and_changes_nothing(
    waiting: Running, settings: dict[str, str], why: str
) -> None:
    before = waiting.status().loop.config
    with pytest.raises(WorkflowUpdateFailedError) as caught:
        waiting.update("configure", Settings(settings), answer=TrainingConfig)
    assert why in str(caught.value.cause)
    assert waiting.status().loop.config == before


def test_a_good_configuration_holds(waiting: Running) -> None:
    new = waiting.update("configure", Settings({"max_tail": "1.5", "deploy_to": "none"}), answer=TrainingConfig)
    assert (new.max_tail, new.deploy_to) == (1.5, None)
    assert waiting.status().loop.config == new


def test_promotion_and_rollback_by_hand(waiting: Running) -> None:
    last = waiting.status().loop.champion.round
    with pytest.raises(WorkflowUpdateFailedError) as caught:
        waiting.update("promote", 0, answer=Champion)
    assert "give the number of a round" in str(caught.value.cause)
    with pytest.raises(WorkflowUpdateFailedError) as caught:
        waiting.update("promote", 77, answer=Champion)
    assert "round 77: no policy" in str(caught.value.cause.cause)
    assert waiting.status().loop.champion.round == last
    waiting.tell("resume")
    eventually(lambda: waiting.status().loop.champion.round > last)
    waiting.tell("pause")
    waiting.until("paused")
    now = waiting.status().loop.champion.round
    assert waiting.update("rollback", answer=Champion).round == now - 1
    assert waiting.update("promote", now, answer=Champion).why == "promoted by hand"
    assert waiting.status().loop.champion.round == now
