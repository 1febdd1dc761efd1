"""serve.py: what cannot be served ends with one line."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import tyro
from policy_files import write_policy

import serve
from deployment.service import Args


def test_what_cannot_be_served_ends_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "damaged.onnx").write_bytes(b"?")
    write_policy(tmp_path / "odd.onnx", resources=None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for flags, words in (
            (("--policy", "alphabetical"), ("alphabetical", "easy-")),
            (("--policy", tmp_path / "damaged.onnx"), ("damaged.onnx", "export it again")),
            (("--policy", tmp_path / "odd.onnx"), ("odd.onnx", "$.resources", "export one")),
            (("--policy", "fifo", "--host", "0.0.0.0"), ("0.0.0.0", "--token-file")),
            (("--policy", "fifo", "--host", "example.org"), ("example.org", "--token-file")),
            (("--policy", "fifo", "--token-file", tmp_path / "empty"), ("empty", "no token")),
            (("--policy", "fifo", "--token-file", tmp_path / "nowhere"), ("nowhere",)),
            (("--policy", "fifo", "--workers", 2, "--record", tmp_path / "a.jsonl"), ("--workers 2", "--record")),
            (("--policy", "fifo", "--record", tmp_path / "no" / "a.jsonl"), ("a.jsonl",)),
            (("--policy", "fifo", "--record", tmp_path / "a.json"), ("a.json", ".jsonl")),
            (("--policy", "fifo", "--port", taken.getsockname()[1]), ("in use",)),
        ):
            with pytest.raises(SystemExit) as ended:
                serve.main(tyro.cli(Args, args=list(map(str, flags))))
            [line] = capsys.readouterr().err.splitlines()
            assert ended.value.code == 2
            assert line.startswith("error: ") and all(word in line for word in words), line


@pytest.mark.parametrize(
    "flag", ["port=99999", "port=-1", "workers=0", "deadline_ms=nan", "deadline_ms=-5", "deadline_ms=0",
             "plan_budget_ms=0", "max_jobs=-1", "max_nodes=0", "max_body_bytes=0", "record_bytes=-1", "record_files=0"],
)  # fmt: skip
def test_numbers_out_of_range_are_refused(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, _, value = flag.partition("=")
    with pytest.raises(SystemExit) as ended:
        serve.main(Args("easy-fifo", **{name: float(value) if name.endswith("_ms") else int(value)}))
    [line] = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and line.startswith(f"error: --{name.replace('_', '-')} {value}") and "give" in line
