"""Where torch's own LSTM was measured to be faster, so that ``auto`` leaves those calls to it.

The table is made from recorded benchmark runs by ``lstm-fast bench tune``. The one that is shipped comes from the runs
in benchmarks/results; one that a user made on their own machine takes its place for the processor it is about.
"""

from __future__ import annotations

import json
import math
import os
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

SHIPPED = Path(__file__).with_name("measured.json")
MARGIN = 0.95  # what an interval's upper end has to stay below
FEWEST_ROUNDS = 6  # of fewer no interval of 95 % can be told
_LEAVING_MS = 0.009  # what it takes to hand a call over to torch, measured on a core of an AMD EPYC
_FARTHEST = 2.0  # from a measured shape, in factors of two of T, B and H together
_UNNAMED = "avx512_bf16"  # the instruction set of runs recorded before runs named theirs


class Call(NamedTuple):
    """What a table's rows are found by: ``place`` is what that function says, ``kind`` one of "layer", "packed",
    "projected" and "cell"."""

    place: str
    dtype: str
    kind: str
    trains: bool
    T: int
    B: int
    H: int

    def distance(self, other: Call) -> float:
        """Factors of two between the shapes."""
        return sum(abs(math.log2(a / b)) for a, b in zip(self[-3:], other[-3:], strict=True))


@lru_cache
def place(device: torch.device) -> str:
    """A type of device, of a CPU with its instruction set, of a GPU with its compute capability: who is faster differs
    with them."""
    if device.type == "cuda":
        return "cuda {}.{}".format(*torch.cuda.get_device_capability(device))
    if device.type != "cpu":
        return device.type
    try:
        from lstm_fast._C import CPU_INSTRUCTION_SETS
    except ImportError:
        return device.type
    return f"cpu {CPU_INSTRUCTION_SETS[-1]}"


def _place_of(run: dict[str, Any]) -> str:
    """Where a run was recorded, as ``place`` says it; environment.py names instruction set and capability."""
    if run["device"] == "cuda":
        return f"cuda {run['capability']}"
    _, named, instruction_set = run["cpu"].rpartition(" with ")
    return f"cpu {instruction_set if named else _UNNAMED}"


def users_table() -> Path:
    """Where ``lstm-fast bench tune`` writes, and ``auto`` looks first."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "lstm_fast" / "measured.json"


def table_from(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """A table of recorded runs (lstm_fast/bench/runner.py): for each call and number of threads the interval of torch's
    time, reached through ``auto``, over ours; of rows that aren't plain in any other way, have the rounds for one, and
    others left alone."""
    rows = []
    for run in runs:
        for row in run["rows"]:
            odd = row["mode"] == "forward" or row["bidirectional"] or row["layers"] > 1 or row.get("last")
            odd = odd or row["I"] not in (0, row["H"])
            unsure = row.get("disturbed") or row["rounds"] < FEWEST_ROUNDS
            if odd or unsure or "torch" not in row["rivals"] or row["choice"].startswith("torch:"):
                continue
            kind = "cell" if row["cell"] else "packed" if row["packed"] else "projected" if row["P"] else "layer"
            call = Call(_place_of(run), row["dtype"], kind, row["mode"] != "inference", row["T"], row["B"], row["H"])
            theirs = row["rivals"]["torch"]
            leaving = 1 + _LEAVING_MS / theirs["ms"]
            rows.append([*call, *(round(leaving * theirs[end], 3) for end in ("ratio_low", "ratio_high"))])
    named = ("date", "commit", "cpu", "gpu", "torch", "threads")
    return {"about": [{key: run[key] for key in named if key in run} for run in runs], "rows": sorted(rows)}


_Table = dict[tuple[str, str, str, bool], list[tuple[Call, float]]]


def _read(path: Path) -> _Table:
    found: _Table = {}
    for *fields, _, high in json.loads(path.read_text())["rows"]:
        call = Call(*fields)
        if not all(isinstance(value, int | float) and value > 0 for value in (*call[-3:], high)):
            raise TypeError(f"{path} holds a row with sizes or a ratio that are no numbers above 0")
        found.setdefault(call[:4], []).append((call, high))
    return found


@lru_cache(maxsize=1)
def _rows() -> _Table:
    """By all but the shape: each shape with its upper end; for the places in a user's table, that one's alone."""
    found: _Table = {}
    for path in (SHIPPED, users_table()):
        try:
            table = _read(path)
        except (OSError, ValueError, KeyError, TypeError):  # there is none, or a user's is broken: no reason to fail
            continue
        places = {key[0] for key in table}
        found = {key: rows for key, rows in found.items() if key[0] not in places} | table
    return found


@lru_cache
def matters(place: str, kind: str) -> bool:
    """Whether torch was faster anywhere in calls of this kind, so that a call's shape has to be looked up."""
    return any(high < MARGIN for key, rows in _rows().items() if (key[0], key[2]) == (place, kind) for _, high in rows)


def _nearest(call: Call) -> list[tuple[float, Call]]:
    """Upper ends and calls of the nearest measured shape, one of each run, that is within reach."""
    if min(call[-3:]) < 1:  # an empty batch
        return []
    known = _rows().get(call[:4], [])
    nearest = min((call.distance(other) for other, _ in known), default=math.inf)
    if nearest > _FARTHEST:
        return []
    return [(high, other) for other, high in known if call.distance(other) == nearest]


@lru_cache(maxsize=4096)
def covers(call: Call) -> bool:
    """Whether a shape within reach was measured."""
    return len(_nearest(call)) > 0


@lru_cache(maxsize=4096)
def torch_is_faster(call: Call) -> str | None:
    """In words, if every run of the nearest measured shape says so; else None."""
    high, other = max(_nearest(call), default=(math.inf, call))
    if high >= MARGIN:
        return None
    return f"torch's own took {high:.2f} of this kernel's time where T={other.T} B={other.B} H={other.H} was measured"
