"""A table of any of the known kinds, and what its columns hold as numbers.

Numeric times are seconds; texts are ISO 8601, in UTC where they do not say. N counts rows.
"""

from __future__ import annotations

import csv
import io
import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from workloads.compressed import as_text, read_bytes
from workloads.jobs import WorkloadError
from workloads.reading import BadLine

if TYPE_CHECKING:
    import pandas as pd  # half a second to import: where a table is read, and nowhere else

MOMENTS, DURATIONS = ("submit", "start", "end"), ("duration", "limit")  # roles of columns that may be texts
# As Kubernetes and others write amounts: 500m, 16Gi
UNITS = {"m": 1e-3, "k": 1e3} | {letter: 1e3 ** (k + 1) for k, letter in enumerate("KMGTP")}
UNITS |= {f"{letter}i": 1024.0 ** (k + 1) for k, letter in enumerate("KMGTP")}
SHOWN = 12  # columns that a message names


def read_frame(path: str) -> tuple[pd.DataFrame, np.ndarray, list[BadLine]]:
    """The table, each row's line in the file (not CSV: its number, from 1), and the rows with too many fields."""
    import pandas as pd

    data = read_bytes(path, "a table of jobs")
    if not (data.startswith(b"PAR1") or data.lstrip().startswith(b"[")):
        return _csv(path, data)
    try:
        if data.startswith(b"PAR1"):
            frame = pd.read_parquet(io.BytesIO(data))
        else:
            records = json.loads(data)
            frame = pd.DataFrame([_of_attempts(record) if "attempts" in record else record for record in records])
    except (ArithmeticError, AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        why = str(error).partition("\n")[0]
        raise WorkloadError(f"{path}: no table that can be read ({why}); give CSV, Parquet or a JSON array") from None
    frame.columns = [str(column) for column in frame.columns]
    if not len(frame):
        raise WorkloadError(f"{path}: no row; give a table with a row for each job")
    frame = frame.reset_index(drop=True)
    return frame, np.arange(1, len(frame) + 1), []


def _csv(path: str, data: bytes) -> tuple[pd.DataFrame, np.ndarray, list[BadLine]]:
    import pandas as pd

    if "\0" in (text := as_text(data)):
        raise WorkloadError(f"{path}: binary data; give CSV, Parquet or a JSON array")
    head = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = max(",;\t|", key=head.count)
    bad: list[BadLine] = []
    numbers: np.ndarray | None = None
    try:
        frame = _parsed(text, delimiter)
    except pd.errors.EmptyDataError:
        raise WorkloadError(f"{path}: empty; give a table with a row for each job") from None
    except (pd.errors.ParserError, ValueError):  # some row has more fields than the first: find them
        reader = csv.reader(io.StringIO(text), delimiter=delimiter, skipinitialspace=True)
        rows: list[list[str]] = []
        kept: list[int] = []
        try:
            for row in reader:
                if rows and len(row) > len(rows[0]):
                    problem = f"{len(row)} fields where line 1 has {len(rows[0])}; correct or delete the line"
                    bad.append(BadLine(reader.line_num, "too many fields", problem))
                else:
                    rows.append(row)
                    kept.append(reader.line_num)
        except csv.Error as error:
            raise WorkloadError(f"{path}: line {reader.line_num}: {error}; give a table in CSV") from None
        again = io.StringIO()
        csv.writer(again).writerows(rows)
        frame, numbers = _parsed(again.getvalue(), ","), np.array(kept[1:])
    frame.columns = [str(column).strip() for column in frame.columns]
    lines = frame.index.to_numpy() + 2 if numbers is None else numbers[frame.index.to_numpy()]
    there = frame.notna().any(axis=1).to_numpy()
    if not there.any():
        raise WorkloadError(f"{path}: no row; give a table with a row for each job")
    return frame[there].reset_index(drop=True), lines[there], bad


def _parsed(text: str, delimiter: str) -> pd.DataFrame:
    import pandas as pd

    return pd.read_csv(
        io.StringIO(text), sep=delimiter, skipinitialspace=True, skip_blank_lines=False, index_col=False,
        low_memory=False,
    )  # fmt: skip


def _of_attempts(record: dict[str, Any]) -> dict[str, Any]:
    """A job of Philly's as a row: from its first attempt on, as long as all attempts together, on what the last had."""
    attempts = [a for a in record["attempts"] if a.get("start_time") and a.get("end_time")]
    flat = {key: value for key, value in record.items() if key != "attempts"}
    if attempts:
        began, ended = (np.array([a[key] for a in attempts], "datetime64[s]") for key in ("start_time", "end_time"))
        servers = attempts[-1].get("detail") or []
        flat |= {"start_time": attempts[0]["start_time"], "duration": float((ended - began).astype(float).sum())}
        flat |= {"servers": len(servers), "gpus": sum(len(server["gpus"]) for server in servers)}
    return flat


def evaluate(path: str, frame: pd.DataFrame, role: str, expression: str) -> tuple[np.ndarray, np.ndarray]:
    """float64[N], NaN where there is nothing; and bool[N], where there is something else than a number or a time.

    Raises:
        WorkloadError: there is no such column.
    """
    parts = [expression] if expression in frame.columns else re.split(r"([*/])", expression)
    value, wrong = np.ones(len(frame)), np.zeros(len(frame), bool)
    for operator, part in zip(["*", *parts[1::2]], parts[::2], strict=True):
        name = part.strip()
        factor: Any
        if name in frame.columns:
            factor, other = _numbers(frame[name], role)
            wrong |= other
        else:
            try:
                factor = float(name)
            except ValueError:
                raise _no_column(path, frame, role, expression, name) from None
        with np.errstate(divide="ignore", invalid="ignore"):
            value = value * factor if operator == "*" else value / factor
    wrong |= np.isinf(value)
    return np.where(wrong, np.nan, value), wrong


def _numbers(series: pd.Series, role: str) -> tuple[np.ndarray, np.ndarray]:
    """float64[N]: numbers and amounts, moments in seconds since 1970, durations in seconds; bool[N]: others."""
    import pandas as pd
    from pandas.api import types

    second = pd.Timedelta(seconds=1)
    if types.is_datetime64_any_dtype(series.dtype):
        aware = series if series.dt.tz is not None else series.dt.tz_localize("UTC")
        return ((aware - pd.Timestamp(0, tz="UTC")) / second).to_numpy(float), np.zeros(len(series), bool)
    if types.is_timedelta64_dtype(series.dtype):
        return (series / second).to_numpy(float), np.zeros(len(series), bool)
    if types.is_numeric_dtype(series.dtype):
        return series.to_numpy(float, na_value=np.nan), np.zeros(len(series), bool)
    text = series.astype(object).where(series.notna(), "").astype(str).str.strip()
    found = np.array(pd.to_numeric(text, errors="coerce"), float)
    empty = (text == "").to_numpy()
    rest = np.isnan(found) & ~empty
    if rest.any() and role in MOMENTS:
        moments = pd.to_datetime(text[rest], errors="coerce", utc=True, format="ISO8601")
        found[rest] = ((moments - pd.Timestamp(0, tz="UTC")) / second).to_numpy(float)
    elif rest.any() and role in DURATIONS:
        found[rest] = (pd.to_timedelta(text[rest], errors="coerce") / second).to_numpy(float)
    elif rest.any() and role not in MOMENTS:
        parts = text[rest].str.extract(r"^([0-9.]+)\s*(m|[kKMGTP]|[KMGTP]i)B?$")
        found[rest] = (pd.to_numeric(parts[0], errors="coerce") * parts[1].map(UNITS)).to_numpy(float)
    return found, np.isnan(found) & ~empty


def texts(path: str, frame: pd.DataFrame, role: str, column: str) -> np.ndarray:
    """object[N], None where there is nothing; whole numbers without a point."""
    if column not in frame.columns:
        raise _no_column(path, frame, role, column, column)
    values = frame[column].astype(object).where(frame[column].notna(), None)
    whole = [str(int(v)) if isinstance(v, float) and v.is_integer() else None if v is None else str(v) for v in values]
    return np.array(whole, object)


def _no_column(path: str, frame: pd.DataFrame, role: str, expression: str, name: str) -> WorkloadError:
    return WorkloadError(f"{path}: {role}={expression}: no column {name!r}; {columns_of(frame)}")


def columns_of(frame: pd.DataFrame) -> str:
    """For a message."""
    return f"columns: {', '.join(frame.columns[:SHOWN])}{', ...' * (len(frame.columns) > SHOWN)}"


def bad_rows(lines: np.ndarray, wrong: np.ndarray, reason: str, problem: str) -> list[BadLine]:
    """A bad line for each row, bool[N], that is wrong; `lines`, int64[N], are the rows' lines."""
    return [BadLine(int(line), reason, f"{problem}; correct or delete the line") for line in lines[wrong]]
