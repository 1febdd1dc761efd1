"""policy.onnx files: one that follows a rule, one of random weights, and metadata that is odd."""

import json
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from policies import JOB_CHOICE, METADATA_KEY, NODE_CHOICE, RULE_WAITS
from ppo_scheduler import Agent
from simulator.kernels import CLUSTER_FEATURES, JOB_FEATURES, NODE_FEATURES
from simulator.observation import Layout
from training.export import export_onnx
from workloads.jobs import Cluster

META = {
    "version": 1, "algorithm": "ppo", "workload": "hpc", "objective": "latency", "reference": "easy-sjf",
    "backfill": "easy", "lock_in": False, "queue_window": 16, "nodes": 1, "resources": 1,
    "job_features": list(JOB_FEATURES), "node_features": list(NODE_FEATURES),
    "cluster_features": list(CLUSTER_FEATURES), "steps": 0, "seed": 1, "rule": None,
}  # fmt: skip


def write_policy(path: Path, *, follow: float = 9.0, metadata: object = None, **changes: object) -> Path:
    """A policy.onnx whose logits are `follow` for what the reference rule would do, 0 for all else that is legal."""

    def constant(name: str, value: np.ndarray) -> onnx.TensorProto:
        return numpy_helper.from_array(value, name)

    nodes = [
        helper.make_node("Gather", ["jobs", "job_choice"], ["job"], axis=2),  # [B, K, 1]
        helper.make_node("Gather", ["nodes", "node_choice"], ["node"], axis=2),  # [B, M, 1]
        helper.make_node("Transpose", ["node"], ["node_row"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["job", "node_row"], ["pairs"]),  # [B, K, M]
        helper.make_node("Reshape", ["pairs", "rows"], ["flat"]),
        helper.make_node("Gather", ["cluster", "rule_waits"], ["waits"], axis=1),
        helper.make_node("Concat", ["flat", "waits"], ["choice"], axis=1),
        helper.make_node("Mul", ["choice", "follow"], ["scored"]),
        helper.make_node("Cast", ["mask"], ["legal"], to=TensorProto.BOOL),
        helper.make_node("Where", ["legal", "scored", "never"], ["logits"]),
    ]
    constants = [
        constant("job_choice", np.array([JOB_CHOICE])), constant("node_choice", np.array([NODE_CHOICE])),
        constant("rule_waits", np.array([RULE_WAITS])), constant("rows", np.array([0, -1])),
        constant("follow", np.float32(follow)), constant("never", np.float32(-1e9)),
    ]  # fmt: skip
    shapes = {"jobs": ["B", "K", None], "nodes": ["B", "M", None], "cluster": ["B", None], "mask": ["B", "A"]}
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", "A"])]
    model = helper.make_model(
        helper.make_graph(nodes, "follow_the_rule", inputs, outputs, constants),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=9,
    )
    text = json.dumps(META | changes) if metadata is None else metadata
    helper.set_model_props(model, {METADATA_KEY: text} if text else {})
    path.parent.mkdir(exist_ok=True)
    onnx.save(model, path)
    return path


def write_random_policy(path: Path, cluster: Cluster, seed: int = 2, **changes: object) -> Path:
    """A policy.onnx of PPO's network with random weights, so that every feature counts."""
    torch.manual_seed(seed)
    nodes, resources = cluster.capacity.shape
    agent = Agent(resources, rule_bonus=0.0)
    torch.nn.init.normal_(agent.query.weight, std=1.0)
    meta = META | {"reference": "easy-wfp3+sjf", "nodes": nodes, "resources": resources} | changes
    export_onnx(agent, path, Layout(16, nodes, resources), meta)
    return path


ODD_METADATA: list[dict[str, object]] = [
    {"resources": "2"}, {"resources": 0}, {"resources": -1}, {"resources": None}, {"resources": 10**12},
    {"queue_window": -1}, {"queue_window": None}, {"queue_window": "64"}, {"nodes": 1.5}, {"reference": 5},
    {"job_features": None}, {"lock_in": "no"}, {"backfill": "hard"}, {"rule": 1},
]  # fmt: skip
