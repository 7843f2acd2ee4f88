"""A recorded run as it could be, and parts of it."""

import json
from pathlib import Path
from typing import Any

from lstm_fast.bench.cases import Case

SMALL = Case(4, 3, 8)


def row(case: Case = SMALL, ratio: float = 2.0, ms: float = 1.0, **other: Any) -> dict[str, Any]:
    """A row against torch that takes ``ms``, give or take a tenth."""
    torch = {"ms": ms * ratio, "p20": ms * ratio, "p80": ms * ratio, "ratio": ratio, "ratio_p20": ratio - 0.2}
    torch.update(ratio_p80=ratio + 0.2, ratio_low=ratio - 0.1, ratio_high=ratio + 0.1)
    return {
        "group": "dense",
        **case._asdict(),
        "mode": "inference",
        "choice": "cpu: a whole layer in one C++ call",
        "rounds": 30,
        "ours": {"ms": ms, "p20": 0.9 * ms, "p80": 1.1 * ms},
        "rivals": {"torch": torch},
        "best_rival": "torch",
        "ratio": ratio,
        "us_per_step": 1e3 * ms / case.T,
        "gflops": 200.0,
        "gbytes_per_s": 3.0,
        "limit_ms": 0.75 * ms,
        "limit": "flops",
        "share": 0.75,
        **other,
    }


def run(*rows: dict[str, Any], **other: Any) -> dict[str, Any]:
    about = {"date": "2026-11-23", "commit": "0123456789abcdef", "cpu": "A CPU", "torch": "2.13.0", "threads": 1}
    return {**about, "grid": "test", "device": "cpu", "skipped": {}, "rows": list(rows), "failed": [], **other}


def lonely(**other: Any) -> dict[str, Any]:
    """A row without a rival or a limit."""
    nothing = {"rivals": {}, **dict.fromkeys(("best_rival", "ratio", "limit_ms", "limit", "share"))}
    return {**row(), **nothing, **other}


def without(found: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in found.items() if name != key}


def write(path: Path, found: object) -> Path:
    path.write_text(json.dumps(found))
    return path
