"""checkpoint.pt: everything that a run needs to go on as if it had never been interrupted, whole or not there.

It is what `torch.save` writes, compressed by Zstandard: most places of queues, histories and windows are empty, or hold
what was there before.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Protocol

import pyarrow
import torch
from torch import nn

from workloads.files import replacing

ZSTANDARD = b"\x28\xb5\x2f\xfd"  # how such files begin (RFC 8878, 3.1.1)


class Stateful(Protocol):
    """What a checkpoint can hold: a network, an optimizer, a replay memory."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


def networks(parts: dict[str, Stateful]) -> dict[str, Any]:
    """Of what a checkpoint holds, the weights of the networks: what another run can start from."""
    return {name: part.state_dict() for name, part in parts.items() if isinstance(part, nn.Module)}


def load_networks(path: Path, parts: dict[str, Stateful], device: torch.device) -> None:
    """
    Raises:
        ValueError: no such file, or the weights of other networks.
    """
    try:
        state = torch.load(path, map_location=device)
        for name in networks(parts):
            parts[name].load_state_dict(state[name])
    except Exception as error:  # torch.load raises whatever the damage leads to
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path}: no weights for this network ({reason}); give weights.pt of such a run") from error


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
            with pyarrow.CompressedOutputStream(str(temporary), "zstd") as stream:
                torch.save(state, stream, pickle_protocol=5)  # 2, the default, takes twice as long for arrays
        except (RuntimeError, OSError) as error:  # how PyTorch and Arrow say that a disk is full
            raise OSError(
                f"{path.parent}: {path.name} cannot be written; make room, then go on from the last one"
            ) from error


def load(path: Path, device: torch.device) -> dict[str, Any]:
    """What was saved there; those of former versions are not compressed. Raises whatever a damage leads to."""
    data = path.read_bytes()
    if data.startswith(ZSTANDARD):
        data = pyarrow.CompressedInputStream(pyarrow.BufferReader(data), "zstd").read()
    return torch.load(io.BytesIO(data), map_location=device, weights_only=False)
