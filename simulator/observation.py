"""How an observation is laid out: jobs, nodes, cluster, and the mask of legal actions."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from simulator.kernels import CLUSTER_WIDTH, JOB_WIDTH, NODE_WIDTH


class Observation(NamedTuple):
    """The parts of an observation: jobs[..., K, Fj], nodes[..., M, Fn], cluster[..., Fc], mask[..., K*M + 1]."""

    jobs: Any
    nodes: Any
    cluster: Any
    mask: Any


@dataclass(frozen=True)
class Layout:
    """How a flat observation is laid out: K visible jobs, M nodes, R resources."""

    window: int
    nodes: int
    resources: int

    @property
    def actions(self) -> int:
        return self.window * self.nodes + 1

    @property
    def size(self) -> int:
        jobs, nodes = self.window * (JOB_WIDTH + self.resources), self.nodes * (NODE_WIDTH + 2 * self.resources)
        return jobs + nodes + CLUSTER_WIDTH + self.actions

    def split(self, obs: Any) -> Observation:
        """Views of an observation [..., D], an array or a tensor."""
        job_width, node_width = JOB_WIDTH + self.resources, NODE_WIDTH + 2 * self.resources
        a = self.window * job_width
        b = a + self.nodes * node_width
        c = b + CLUSTER_WIDTH
        jobs = obs[..., :a].reshape(*obs.shape[:-1], self.window, job_width)
        nodes = obs[..., a:b].reshape(*obs.shape[:-1], self.nodes, node_width)
        return Observation(jobs, nodes, obs[..., b:c], obs[..., c:])
