"""``python -m benchmarks.compare``: lstm_fast.LSTM against torch.nn.LSTM on a CPU, in interleaved pairs.

Both modules share weights and input. Before the clock starts their results must agree. Then ours and theirs run in
turn; a row holds both medians, the median, p20 and p80 of the ratios theirs/ours pair by pair, and our rate beside the
core's peak (benchmarks/peak.py) of the same run. Writes ``results/cpu-<threads>t.json``; ``--readme`` renders the
recorded files into the README's table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import lstm_fast
from benchmarks.environment import describe
from benchmarks.memory import peak_memory
from benchmarks.peak import peak_gflops

ROOT = Path(__file__).parent
README = ROOT.parent / "README.md"
MARKERS = ("<!-- table: begin -->", "<!-- table: end -->")
MODES = ("inference", "forward+backward")
SECONDS_PER_ROW = 1.0
FEWEST_PAIRS = 7


class Case(NamedTuple):
    """One shape: T steps, B sequences, I = H features and hidden units, P projected (0 for none)."""

    T: int
    B: int
    H: int
    P: int = 0
    packed: bool = False  # lengths uniform in 1..T
    dtype: str = "float32"

    def flops(self) -> float:
        """Of the products of a dense forward pass."""
        projected = self.P or self.H
        return 2.0 * self.T * self.B * (4 * self.H * (self.H + projected) + self.P * self.H)


_HIDDEN = (64, 128, 256, 512, 1024)
_SHAPES = [Case(*shape) for shape in product((25, 128), (8, 64), (128, 256, 512))]
GROUPS: dict[str, list[Case]] = {
    **{f"fp32, B = {B}": [Case(T, B, H) for T in (25, 128) for H in _HIDDEN] for B in (1, 8, 32, 128)},
    "fp32, B = 1, T = 1..64": [Case(T, 1, H) for T in (1, 4, 16, 64) for H in _HIDDEN],
    "fp32, packed": [case._replace(packed=True) for case in _SHAPES],
    "fp32, projected to H / 2": [case._replace(P=case.H // 2) for case in _SHAPES],
    "bf16": [case._replace(dtype="bfloat16") for case in _SHAPES],
}
MEMORY = [Case(128, 32, 256), Case(64, 64, 512), Case(25, 1, 1024), Case(128, 64, 128, packed=True)]


def build(case: Case) -> tuple[Any, nn.LSTM, lstm_fast.LSTM]:
    """The input, and both modules with the same weights."""
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    theirs = nn.LSTM(case.H, case.H, proj_size=case.P, dtype=dtype)
    ours = lstm_fast.LSTM(case.H, case.H, proj_size=case.P, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    x: Any = torch.randn(case.T, case.B, case.H, dtype=dtype)
    if case.packed:
        x = nn.utils.rnn.pack_padded_sequence(x, torch.randint(1, case.T + 1, (case.B,)), enforce_sorted=False)
    return x, theirs, ours


def task(module: nn.Module, x: Any, mode: str) -> Callable[[], torch.Tensor]:
    """One call of the benchmark, which returns the output."""

    def infer() -> torch.Tensor:
        with torch.no_grad():
            y = module(x)[0]
        return y if isinstance(y, torch.Tensor) else y.data

    def train() -> torch.Tensor:
        module.zero_grad()
        y = module(x)[0]
        y = y if isinstance(y, torch.Tensor) else y.data
        y.backward(torch.ones_like(y))
        return y.detach()

    return infer if mode == "inference" else train


def measure(ours: Callable[[], torch.Tensor], theirs: Callable[[], torch.Tensor]) -> dict[str, float]:
    """Milliseconds and ratios of interleaved pairs, at least ``FEWEST_PAIRS`` of them."""
    right = theirs()
    rtol, atol = (1e-3, 1e-4) if right.dtype == torch.float32 else (0.05, 0.03)
    torch.testing.assert_close(ours(), right, rtol=rtol, atol=atol)
    pairs: list[tuple[float, float]] = []
    end = time.perf_counter() + SECONDS_PER_ROW
    while len(pairs) < FEWEST_PAIRS or time.perf_counter() < end:
        start = time.perf_counter()
        ours()
        middle = time.perf_counter()
        theirs()
        pairs.append((middle - start, time.perf_counter() - middle))
    ratios = statistics.quantiles([b / a for a, b in pairs], n=10)
    return {
        "ours_ms": 1e3 * statistics.median(a for a, _ in pairs),
        "theirs_ms": 1e3 * statistics.median(b for _, b in pairs),
        "ratio": ratios[4],
        "ratio_p20": ratios[1],
        "ratio_p80": ratios[7],
        "pairs": len(pairs),
    }


def run(threads: int) -> dict[str, Any]:
    """Every group's rows, and peak memory of a few shapes."""
    torch.set_num_threads(threads)
    peak = peak_gflops()
    rows = []
    for group, cases in GROUPS.items():
        for case, mode in product(cases, MODES):
            x, theirs, ours = build(case)
            row = {"group": group, **case._asdict(), "mode": mode, "choice": lstm_fast.explain(ours, x)}
            row.update(measure(task(ours, x, mode), task(theirs, x, mode)))
            if not case.packed:
                flops = case.flops() * (1 if mode == "inference" else 3)
                row["gflops"] = flops / row["ours_ms"] / 1e6
            rows.append(row)
            print(f"{group:28} {case.T:4} x {case.B:4} x {case.H:5} {mode:17} {row['ratio']:6.2f}", flush=True)
    memory = [{**case._asdict(), **peak_memory(case)} for case in MEMORY]
    return {**describe(), "peak_gflops_of_a_core": peak, "rows": rows, "memory": memory}


def geometric_mean(values: Iterable[float]) -> float:
    """Of positive numbers."""
    return statistics.geometric_mean(list(values))


def render(results: list[dict[str, Any]]) -> str:
    """The README's table, from recorded runs of one machine: a line a group, a column a mode and number of threads."""
    first = results[0]
    columns = [(mode, result) for mode in MODES for result in results]
    heads = [f"{mode}, {result['threads']} thread{'s' * (result['threads'] > 1)}" for mode, result in columns]
    lines = [
        "How many times as long torch.nn.LSTM takes as lstm_fast.LSTM: the geometric mean, and the least and the most "
        f"of a group's shapes, each the median of interleaved pairs. {first['cpu']}, torch {first['torch']}, commit "
        f"{first['commit'][:9]}.",
        "",
        "| | " + " | ".join(heads) + " |",
        "| --- " * (1 + len(heads)) + "|",
    ]
    for group in dict.fromkeys(row["group"] for row in first["rows"]):
        cells = []
        for mode, result in columns:
            ratios = [row["ratio"] for row in result["rows"] if row["group"] == group and row["mode"] == mode]
            cells.append(f"{geometric_mean(ratios):.2f}× ({min(ratios):.2f}..{max(ratios):.2f})")
        lines.append(f"| {group} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def recorded() -> list[dict[str, Any]]:
    """The recorded runs, by number of threads."""
    return [json.loads(path.read_text()) for path in sorted((ROOT / "results").glob("cpu-*t.json"))]


def write_readme() -> None:
    """The table between the README's markers."""
    text = README.read_text()
    before, _, rest = text.partition(MARKERS[0])
    _, _, after = rest.partition(MARKERS[1])
    README.write_text(f"{before}{MARKERS[0]}\n{render(recorded())}{MARKERS[1]}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--readme", action="store_true", help="render the recorded results into the README; no run")
    args = parser.parse_args()
    if not args.readme:
        path = ROOT / "results" / f"cpu-{args.threads}t.json"
        path.write_text(json.dumps(run(args.threads), indent=1) + "\n")
        print(path)
    write_readme()


if __name__ == "__main__":
    main()
