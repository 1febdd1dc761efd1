"""The settings of a loop: what is checked, and how text becomes values."""

import pytest

from orchestration.config import PRESETS, TrainingConfig, changed, check
from workloads import presets


def test_the_presets_are_the_presets() -> None:
    assert tuple(presets.PRESETS) == PRESETS


def test_the_defaults_make_sense() -> None:
    check(TrainingConfig())


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"candidates": "0"}, "candidates 0: give 1 or more"),
        ({"interval": "nan"}, "interval nan: give 0 or more"),
        ({"interval": "soon"}, "interval 'soon': give a number"),
        ({"rounds": "1.5"}, "rounds '1.5': give a number without fraction"),
        ({"max_tail": "0.9"}, "max_tail 0.9: give 1 or more"),
        ({"track": "perhaps"}, "track 'perhaps': give true or false"),
        ({"algorithm": "sarsa"}, "algorithm 'sarsa': give one of ppo, dqn"),
        ({"training_flags": "--num-envs '8"}, 'training_flags "--num-envs \'8": No closing quotation; close what is'),
        ({"reading_flags": "--columns '8"}, 'reading_flags "--columns \'8": No closing quotation; close what is'),
        (
            {"training_flags": "--num-envs 8 --run_name=a"},
            "training_flags --run_name=a: the loop gives this one itself",
        ),
        ({"store": "s3://b"}, "store: no setting that can be changed"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict[str, str], why: str) -> None:
    with pytest.raises(ValueError) as caught:
        changed(TrainingConfig(), settings)
    assert why in str(caught.value)


def test_a_store_nobody_knows_is_refused() -> None:
    with pytest.raises(ValueError, match="give a folder, or an address that begins with s3://"):
        check(TrainingConfig(store="ftp://somewhere"))


def test_text_becomes_values_of_the_settings_kind() -> None:
    new = changed(
        TrainingConfig(deploy_to="a"),
        {"candidates": "3", "interval": "60", "track": "True", "deploy_to": "none", "workload": "hpc"},
    )
    assert (new.candidates, new.interval, new.track, new.deploy_to, new.workload) == (3, 60.0, True, None, "hpc")
