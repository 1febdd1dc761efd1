"""Stands in for `benchmark.py compare`: candidates are STUB_GAIN percent better than the champion, or EASY-FIFO."""

import argparse
import json
import os
from pathlib import Path

METRICS = ("latency", "wait", "bounded_slowdown", "utilization", "makespan")

flags = argparse.ArgumentParser()
flags.add_argument("--workload")
flags.add_argument("--objective")
flags.add_argument("--policies", nargs="+")
flags.add_argument("--output", type=Path)
flags.add_argument("--report", type=Path)
args = flags.parse_args()

names = ["/".join(Path(name).parts[-2:]) if name.endswith(".onnx") else name for name in args.policies]
names = [rule for name in names for rule in (("fifo", "easy-sjf") if name == "all" else (name,))]
base = 90.0 if "champion/policy.onnx" in names else 100.0
better = 1 - float(os.environ.get("STUB_GAIN", "10")) / 100
cost = {"champion/policy.onnx": 90.0, "easy-fifo": 100.0, "fifo": 200.0, "easy-sjf": 95.0}
cost |= {name: base * better for name in names if name.startswith("candidate-")}
policies = {
    name: {m: {"mean": cost[name], "per_block": [cost[name] * (1 + b / 100) for b in range(20)]} for m in METRICS}
    for name in names
}
tails = {name: {"wait_p99": 1_000.0, "wait_max": 5_000.0} for name in names}
if args.report:
    args.report.mkdir(parents=True)
    (args.report / "index.html").write_text("<p>stub")
args.output.write_text(json.dumps({"policies": policies, "tails": tails, "left_out": []}))
