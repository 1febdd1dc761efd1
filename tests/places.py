"""Where the tests find things: the repository, its small trace, and what may lie beside the repository."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMALL = ROOT / "tests" / "data" / "small.swf"
SHARED = ROOT.parent / "shared"
TRACES, REFERENCE = SHARED / "traces", SHARED / "reference" / "rlscheduler.json"
needs_traces = pytest.mark.skipif(not TRACES.is_dir(), reason=f"the public traces are not in {TRACES}")
needs_reference = pytest.mark.skipif(
    not (REFERENCE.is_file() and TRACES.is_dir()), reason=f"the published figures and their traces are not in {SHARED}"
)
