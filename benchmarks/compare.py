"""``python -m benchmarks.compare``: lstm_fast.LSTM against torch.nn.LSTM on a CPU, in interleaved pairs.

Both modules share weights and input. Before the clock starts their results must agree. Then ours and theirs run in
turn; a row holds both medians and the median, p20 and p80 of the ratios theirs/ours pair by pair. Writes
``results/cpu-<threads>t.json``; ``--readme`` renders the recorded files into the README's table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lstm_fast
from benchmarks.environment import describe

ROOT = Path(__file__).parent
README = ROOT.parent / "README.md"
MARKERS = ("<!-- table: begin -->", "<!-- table: end -->")
SHAPES = [(1, 1, 256), (32, 1, 128), (32, 1, 512), (64, 16, 256), (64, 16, 512), (64, 64, 512), (25, 32, 1024)]  # T B H
MODES = ("inference", "forward+backward")
SECONDS_PER_ROW = 4.0


def build(T: int, B: int, H: int, packed: bool) -> tuple[Any, nn.LSTM, lstm_fast.LSTM]:
    torch.manual_seed(0)
    theirs = nn.LSTM(H, H)
    ours = lstm_fast.LSTM(H, H)
    ours.load_state_dict(theirs.state_dict())
    x: Any = torch.randn(T, B, H)
    if packed:
        x = nn.utils.rnn.pack_padded_sequence(x, torch.randint(1, T + 1, (B,)), enforce_sorted=False)
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
    """Milliseconds and ratios of interleaved pairs, at least 20 of them."""
    torch.testing.assert_close(ours(), theirs(), rtol=1e-3, atol=1e-4)
    pairs: list[tuple[float, float]] = []
    end = time.perf_counter() + SECONDS_PER_ROW
    while len(pairs) < 20 or time.perf_counter() < end:
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
    torch.set_num_threads(threads)
    rows = []
    for T, B, H in SHAPES:
        for packed in (False, True) if (T, B, H) == (64, 16, 256) else (False,):
            for mode in MODES:
                x, theirs, ours = build(T, B, H, packed)
                row = {"T": T, "B": B, "H": H, "packed": packed, "mode": mode, "choice": lstm_fast.explain(ours, x)}
                row.update(measure(task(ours, x, mode), task(theirs, x, mode)))
                rows.append(row)
                print(f"{row}", flush=True)
    return {**describe(), "dtype": "fp32", "rows": rows}


def render(results: list[dict[str, Any]]) -> str:
    """The README's table, from recorded runs of one machine: a line a shape, a column a mode and number of threads."""
    first = results[0]
    heads = [f"{mode}, {r['threads']} thread{'s' * (r['threads'] > 1)}" for mode in MODES for r in results]
    shapes: dict[str, list[str]] = {}
    for mode in MODES:
        for row in (row for result in results for row in result["rows"] if row["mode"] == mode):
            name = f"{row['T']} × {row['B']} × {row['H']}" + (", packed" if row["packed"] else "")
            cell = f"{row['ratio']:.2f}× ({row['ratio_p20']:.2f}..{row['ratio_p80']:.2f})"
            shapes.setdefault(name, []).append(f"{row['ours_ms']:.3g} ms, {cell}")
    lines = [
        "Time of lstm_fast.LSTM, and how many times as long torch.nn.LSTM took: medians (p20..p80) of interleaved pairs"
        f", fp32, {first['cpu']}, torch {first['torch']}, commit {first['commit'][:9]}.",
        "",
        "| T × B × H | " + " | ".join(heads) + " |",
        "| --- " * (1 + len(heads)) + "|",
        *(f"| {name} | " + " | ".join(cells) + " |" for name, cells in shapes.items()),
    ]
    return "\n".join(lines) + "\n"


def recorded() -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((ROOT / "results").glob("cpu-*t.json"))]


def write_readme() -> None:
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
