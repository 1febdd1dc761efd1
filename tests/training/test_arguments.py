"""What is wrong with the flags is said in one line, before anything is written."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal, get_type_hints

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from learners import SMALL, command, script
from msgspec import Meta, ValidationError, convert

import dqn_scheduler
import ppo_scheduler
from training.arguments import check

OF_ALL = [
    (("--resume", "nowhere"), ("args.json", "folder of a run")),
    (("--max-tail", "nan"), ("max_tail is nan",)),
    (("--max-tail", "0.5"), ("max_tail is 0.5",)),
    (("--checkpoint-seconds", "-1"), ("checkpoint_seconds is -1.0; use 0",)),
    (("--queue-window", "20000"), ("queue_window is 20000; use 1 to 10000",)),
    (("--queue-window", "0"), ("queue_window is 0; use 1 to 10000",)),
    (("--total-timesteps", "-5"), ("total_timesteps is -5; use 1 or more",)),
    (("--gamma", "1.5"), ("gamma is 1.5; use 0 to 1",)),
    (("--training-loads", "1", "-2"), ("training_loads is -2.0; use more than 0",)),
    (("--ema-decay", "1"), ("ema_decay is 1.0; use 0 or more, less than 1",)),
    *([] if torch.cuda.is_available() else [(("--cuda",), ("--cuda: PyTorch finds no GPU here",))]),
    (("--workload", "nowhere.swf"), ("nowhere.swf", "presets")),
    (("--reference", "alphabetical"), ("alphabetical", "easy-")),
    (("--num-jobs", "100000"), ("lower num_jobs",)),
    (("--num-envs", "0"), ("num_envs is 0",)),
    (("--seed", "-1"), ("seed is -1; use 0",)),
    (("--backfill", "none", "--reference", "easy-saf"), ("easy-saf backfills", "without easy-")),
    (("--backfill", "none", "--reference", "tuned"), ("tuned backfills", "without easy-")),
    (("--validation-loads",), ("no load is given",)),
    (("--num-iterations", "3"), ("num_iterations is computed",)),
    (("--run-name", "a/b"), ("run_name is 'a/b'; give a name without folders",)),
    (("--run-name", ".."), ("run_name is '..'; give a name without folders",)),
]
OF_PPO = [
    (("--batch-size", "64"), ("batch_size is computed",)),
    (("--num-minibatches", "1000"), ("num_minibatches", "divisor")),
    (("--num-minibatches", "3"), ("num_minibatches", "divisor")),
    (("--update-epochs", "0"), ("update_epochs is 0; use 1",)),
    (("--num-envs", "1", "--num-steps", "1"), ("num_envs * num_steps is 1",)),
]
OF_DQN = [
    (("--n-step", "200"), ("n_step is 200; use less than buffer_steps",)),
    (("--n-step", "0"), ("n_step is 0; use 1 or more",)),
    (("--batch-size", "0"), ("batch_size is 0; use 1 or more",)),
    (("--huber-delta", "0"), ("huber_delta is 0.0; use more than 0",)),
]
CASES = [(algorithm, *case) for algorithm in (ppo_scheduler, dqn_scheduler) for case in OF_ALL]
CASES += [(ppo_scheduler, *case) for case in OF_PPO] + [(dqn_scheduler, *case) for case in OF_DQN]


def ranges(algorithm: ModuleType) -> dict[str, Meta]:
    hints = get_type_hints(algorithm.Args, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items() if hasattr(hint, "__metadata__")}


@given(data=st.data())
def test_every_flag_has_its_range(algorithm: ModuleType, data: st.DataObject) -> None:
    """Within it nothing is refused, and outside, not a number included, the line names the flag and the range."""
    found = ranges(algorithm)
    numbers = {field.name for field in fields(algorithm.Args) if isinstance(field.default, int | float | tuple)}
    free = {"torch_deterministic", "cuda", "track", "lock_in", "anneal_lr", "rule_bonus"}
    free |= {"skip_bad_lines", "columns", "nodes"}  # which `Reading` looks at
    assert numbers - set(found) <= free | {"batch_size", "minibatch_size", "num_iterations"}
    check(algorithm.Args())
    name = data.draw(st.sampled_from(sorted(found)))
    meta, value = found[name], data.draw(st.integers(-3, 3) | st.floats(-3, 3) | st.just(float("nan")))
    args = algorithm.Args()
    setattr(args, name, (value,) if isinstance(getattr(args, name), tuple) else value)
    try:
        convert(value, Annotated[float, meta] if value == value else Literal["no number is"])  # msgspec's own judgement
    except ValidationError:
        with pytest.raises(ValueError, match=rf"^{name} is {value}; use .*\d"):
            check(args)
    else:
        check(args)


@pytest.mark.parametrize(("algorithm", "flags", "words"), CASES)
def test_bad_input_ends_with_one_line(
    tmp_path: Path, algorithm: ModuleType, flags: tuple[str, ...], words: tuple[str, ...]
) -> None:
    result = command(algorithm, tmp_path, *SMALL[algorithm], *flags)
    assert result.code == 2, result.err
    assert result.last.startswith("error: ") and all(word in result.last for word in words), result.last
    assert "Traceback" not in result.err
    assert not (tmp_path / "runs").exists()


def test_a_run_goes_on_with_its_own_flags_only(finished: Path, tmp_path: Path, algorithm: ModuleType) -> None:
    for steps in ("4096", "1500000"):  # also where it is the default
        result = command(algorithm, tmp_path, "--resume", str(finished), "--total-timesteps", steps)
        assert result.code == 2 and "--resume" in result.last and "leave out total_timesteps" in result.last
    stored = json.loads((finished / "args.json").read_text())
    assert stored["num_iterations"] == 8 and stored["resume"] is None
    assert stored["reference"].startswith("easy-sjf@")  # what was chosen
    assert list(stored) == list(asdict(algorithm.Args()))


@pytest.mark.slow
def test_the_script_says_it_in_one_line_and_ends_with_2(tmp_path: Path, algorithm: ModuleType) -> None:
    result = script(algorithm, tmp_path, "--workload", "nowhere.swf")
    [line] = result.stderr.splitlines()
    assert result.returncode == 2 and line.startswith("error: nowhere.swf: no such file or preset")


@pytest.mark.slow
@pytest.mark.parametrize(("script_name", "flag"), [("ppo", "num-steps"), ("dqn", "buffer-steps")])
def test_too_little_memory_ends_with_one_line(tmp_path: Path, script_name: str, flag: str) -> None:
    """More than any address space has, where rewards and observations of that many decisions are to be kept."""
    algorithm = {"ppo": ppo_scheduler, "dqn": dqn_scheduler}[script_name]
    result = script(algorithm, tmp_path, *SMALL[algorithm], f"--{flag}", str(10**11))
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 2 and last.startswith("error: out of memory (") and flag.replace("-", "_") in last
    assert "Traceback" not in result.stderr and not (tmp_path / "runs").exists()
