"""What TensorBoard and W&B show of a run."""

from __future__ import annotations

import io
import json
import os
from dataclasses import asdict, fields
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from learners import SMALL, events, records, run_folder, scalars, script
from PIL import Image
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from policies import load_policy


def test_tensorboard_shows_the_run_and_not_only_its_curves(finished: Path, algorithm: ModuleType) -> None:
    found = events(finished)
    tags = found.Tags()
    content = {name: HParamsPluginData.FromString(c) for name, c in found.PluginTagToContent("hparams").items()}
    values = content["_hparams_/session_start_info"].session_start_info.hparams
    assert (
        values["learning_rate"].number_value == algorithm.Args().learning_rate
        and values["objective"].string_value == "wait"
    )
    assert set(values) == {field.name for field in fields(algorithm.Args)}
    metrics = {m.name.tag for m in content["_hparams_/experiment"].experiment.metric_infos}
    assert "eval/best_improvement" in metrics and metrics <= set(tags["scalars"])
    assert content["_hparams_/session_end_info"].session_end_info.status == 1  # success
    layout = layout_pb2.Layout.FromString(found.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    charted = {tag for category in layout.category for chart in category.chart for tag in chart.multiline.tag}
    assert len(charted) > 8 and charted <= set(tags["scalars"])
    assert (
        f"|learning_rate|{algorithm.Args().learning_rate}|"
        in found.Tensors("hyperparameters/text_summary")[0].tensor_proto.string_val[0].decode()
    )
    assert len(tags["images"]) == 2 and [image.step for image in found.Images("gantt/policy")] == [0, 256, 512]
    for tag in tags["images"]:
        picture = np.asarray(Image.open(io.BytesIO(found.Images(tag)[0].encoded_image_string)))
        assert picture.shape == (256, 640, 3) and len(np.unique(picture.reshape(-1, 3), axis=0)) > 5
    best = scalars(finished, "eval/best_improvement")
    raw = scalars(finished, "eval/improvement")
    assert all(best[step] >= raw[step] or step not in best for step in raw) and sorted(best.values()) == [
        *best.values()
    ]


@pytest.mark.slow
def test_tracking_with_no_way_to_log_in_is_one_line_and_writes_no_run(tmp_path: Path, algorithm: ModuleType) -> None:
    alone = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_A")}
    result = script(
        algorithm, tmp_path, *SMALL[algorithm], "--track", env=alone | {"HOME": str(tmp_path), "WANDB_MODE": "online"}
    )
    assert result.returncode == 2 and not list(tmp_path.glob("runs/*/*"))
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: --track: ") and last.endswith("run wandb login, or set WANDB_MODE=offline")


@pytest.mark.slow
def test_tracking_works_without_an_account(tmp_path: Path, algorithm: ModuleType) -> None:
    pytest.importorskip("wandb")
    result = script(
        algorithm, tmp_path, *SMALL[algorithm], "--track", "--total-timesteps", "128",
        env=os.environ | {"WANDB_MODE": "offline"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    run = run_folder(tmp_path)
    (offline,) = tmp_path.glob("wandb/offline-run-*")
    kept = records(next(offline.glob("*.wandb")))
    assert {item.key for r in kept for item in r.run.config.update} >= {field.name for field in fields(algorithm.Args)}
    logged = {item.nested_key[0] if item.nested_key else item.key for r in kept for item in r.history.item}
    tags = events(run).Tags()
    assert logged >= {*tags["scalars"], *tags["images"], "validation"}
    assert len(list(offline.glob("files/media/images/*.png"))) == 4  # the rule, and the policy three times
    (table,) = offline.glob("files/media/table/*.json")
    columns, rows = (json.loads(table.read_text())[key] for key in ("columns", "data"))
    named = {name.split(" (= ")[0].split(",")[0] for row in rows for name in row[0].split("\n")}
    assert columns[:3] == ["policy", "wait", "to FIFO"] and {algorithm.__name__[:3].upper(), "fifo"} < named
    (artifact,) = (r.artifact for r in kept if r.WhichOneof("record_type") == "artifact" and r.artifact.type == "model")
    metadata = json.loads(artifact.metadata)
    assert metadata == asdict(load_policy(str(run / "policy.onnx")).metadata)
    assert [entry.path for entry in artifact.manifest.contents] == ["policy.onnx"]
