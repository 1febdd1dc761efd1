"""checkpoint.pt: everything that a run needs to go on as if it had never been interrupted, whole or not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch

from workloads.files import replacing


class Stateful(Protocol):
    """What a checkpoint can hold: a network, an optimizer, a replay memory."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


def random_state() -> dict[str, Any]:
    return {"random": torch.get_rng_state(), "cuda_random": torch.cuda.get_rng_state_all()}


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["random"].cpu())
    if device.type == "cuda" and state["cuda_random"]:
        torch.cuda.set_rng_state_all([random.cpu() for random in state["cuda_random"]])


def save(path: Path, state: dict[str, Any]) -> None:
    """Raises OSError: there is no room for it; the one before is still there."""
    with replacing(path) as temporary:
        try:
            torch.save(state, temporary, pickle_protocol=5)  # 2, the default, takes twice as long for arrays
        except RuntimeError as error:  # how PyTorch says that a disk is full
            raise OSError(
                f"{path.parent}: {path.name} cannot be written; make room, then go on from the last one"
            ) from error
