"""policy.onnx: what a network looks like to those who use it (`policies.OnnxPolicy`)."""

from __future__ import annotations

import json
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from policies import JOB_CHOICE, METADATA_KEY, NODE_CHOICE, RULE_WAITS
from simulator.observation import Layout, Observation
from workloads.files import replacing

NEVER = -1e9  # what an illegal action is worth


def rule_choice(jobs: Tensor, nodes: Tensor, cluster: Tensor) -> Tensor:
    """[B, K*M + 1]: 1 for the reference's own choice, as observations tell it, and 0 for everything else."""
    pairs = jobs[..., JOB_CHOICE, None] * nodes[..., NODE_CHOICE][:, None]
    return torch.cat([pairs.flatten(1), cluster[:, RULE_WAITS, None]], 1)


class FollowRule(nn.Module):
    """The reference's own choice in the form of an agent: exported where training found nothing better."""

    def logits(self, jobs: Tensor, nodes: Tensor, cluster: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask > 0, rule_choice(jobs, nodes, cluster), NEVER)


class LogitsOnly(nn.Module):
    """What the exported file computes of an agent, a network with `logits`: a critic stays behind."""

    def __init__(self, agent: Any) -> None:
        super().__init__()
        self.agent = agent

    def forward(self, jobs: Tensor, nodes: Tensor, cluster: Tensor, mask: Tensor) -> Tensor:
        return self.agent.logits(jobs, nodes, cluster, mask)


def export_onnx(agent: nn.Module, path: Path, layout: Layout, metadata: dict[str, Any]) -> None:
    """Write policy.onnx: jobs, nodes, cluster, mask -> logits; batch, queue window and node count are dynamic."""
    example = layout.split(torch.zeros(2, layout.size))
    axes = {"jobs": {0: "batch", 1: "window"}, "nodes": {0: "batch", 1: "nodes"}, "cluster": {0: "batch"}}
    axes |= {"mask": {0: "batch", 1: "actions"}, "logits": {0: "batch", 1: "actions"}}
    with replacing(path) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this exporter is deprecated; its successor cannot tell K*M + 1 from K and M
        torch.onnx.export(
            LogitsOnly(deepcopy(agent)).cpu().eval(), tuple(example), str(temporary), opset_version=17, dynamo=False,
            input_names=list(Observation._fields), output_names=["logits"], dynamic_axes=axes,
        )  # fmt: skip
        model = onnx.load(temporary)
        entry = model.metadata_props.add()
        entry.key, entry.value = METADATA_KEY, json.dumps(metadata)
        onnx.save(model, temporary)


def check_export(agent: Any, parts: Observation) -> None:
    """Compare the two forms of a network on observations: `logits`, which is exported, and `forward`, which learns.

    Raises:
        ValueError: they are not the same.
    """
    trained = agent(*parts)
    trained = trained[0] if isinstance(trained, tuple) else trained  # a critic's values are not exported
    if not torch.allclose(trained, agent.logits(*parts), atol=1e-4):
        raise ValueError("Agent.logits, which is exported, is not what Agent.forward computes; change both")
