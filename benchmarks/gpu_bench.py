"""``python -m benchmarks.gpu_bench``: lstm_fast against nn.LSTM on the GPU at hand, input product included.

Before the clock each result is compared with nn.LSTM in fp64: our error may be at most twice nn.LSTM's own in the same
dtype. Then interleaved pairs; medians, p20 and p80 of the ratios. Each row is a line of JSON, written as soon as it is
known; what the file already holds isn't measured again. What nn.LSTM launches is counted when all rows have been timed:
a profiler may stay and slow down what comes after it. Exit code 0 if all is well, 1 if a row is wrong or failed, 3 if a
kernel's fault took the card from this process: another can go on.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lstm_fast.bench import rivals, runner, timing
from lstm_fast.bench.cases import Case
from lstm_fast.kernels import persistent

PAIRS = 20
QUEUED = 8  # calls in a row, so that the host launches the next while the card is at the last, as in training
LOST = 3  # the exit code
COUNTING = 15  # seconds beyond its time that launches are counted for


class Group(NamedTuple):
    """What issues and readers ask of a set of rows: the geometric mean of theirs/ours, at least and hoped for."""

    what: str
    floor: float | None = None
    aim: float | None = None


GROUPS = {
    "bf16": Group("bf16 against nn.LSTM in bf16, forward+backward", 2.0, 5.0),
    "fp16": Group("fp16 against cuDNN's persistent algorithm, forward+backward", 1.0, 2.0),
    "tf32": Group("fp32 with TF32 on both sides, forward+backward", 1.5, 4.0),
    "packed": Group("bf16, packed, lengths uniform in 1..T, forward+backward", 1.5, 5.0),
    "bidirectional": Group("bf16, both directions, forward+backward", 1.5, 5.0),
    "inference": Group("bf16, inference"),
    "grid": Group("bf16 over the grid where clusters would do, forward+backward"),
    "gates": Group("the stepwise gate kernels, bf16, forward+backward"),
}


STEP = {"forward": (1.5, 0.6), "backward": (3.0, 1.2)}  # microseconds a step, at most and hoped for
STEP_SHAPE = (1024, 16, 512)  # T, B, H for which that is asked


class Shape(NamedTuple):
    group: str
    T: int
    B: int
    H: int
    backend: str = "persistent"


def shapes() -> Iterator[Shape]:
    """The most telling first: what the budget leaves out is at the end."""
    yield Shape("bf16", *STEP_SHAPE)
    for group in ("fp16", "tf32", "packed", "bidirectional", "inference"):
        yield Shape(group, 256, 16, 512)
    for B, H in ((16, 256), (64, 512), (16, 768), (2, 512), (128, 256), (128, 512), (64, 768), (2, 256), (16, 1024)):
        yield Shape("bf16", 256, B, H)
    for B, H in ((16, 256), (64, 512), (128, 256), (16, 768)):
        for group in ("fp16", "tf32", "packed", "bidirectional", "inference"):
            yield Shape(group, 256, B, H)
    for B, H in ((16, 512), (64, 512), (16, 768)):
        yield Shape("grid", 256, B, H)
    for group, B, H in (("bf16", 64, 1024), ("fp16", 16, 1024), ("tf32", 16, 1024), ("packed", 64, 1024)):
        yield Shape(group, 256, B, H)
    for backend in ("cuda", "triton"):
        yield Shape("gates", 64, 16, 512, backend)
    for B, H in ((2, 256), (16, 512), (128, 768)):
        yield Shape("bf16", 2048, B, H)


def case_of(shape: Shape) -> Case:
    """What a row of its group measures."""
    dtype = {"fp16": "float16", "tf32": "float32"}.get(shape.group, "bfloat16")
    kind = {"bidirectional": shape.group == "bidirectional", "packed": shape.group == "packed"}
    return Case(shape.T, shape.B, shape.H, dtype=dtype, **kind)


def build(shape: Shape, device: str = "cuda") -> tuple[Any, nn.Module, nn.Module]:
    """The input, nn.LSTM and ours with its weights."""
    case = case_of(shape)
    theirs = rivals.oracle(case, device)
    return rivals.make_input(case, device), theirs, rivals.ours(case, theirs, shape.backend)


def errors(x: Any, theirs: nn.Module, ours: nn.Module) -> tuple[float, float]:
    """Of ours and of theirs, against nn.LSTM in fp64: the worst of both modes' output and the gradients."""

    def run(module: nn.Module, sequence: Any) -> list[Tensor]:
        module.zero_grad()
        inferred = rivals.task(module, sequence, "inference")()
        leaf, values = rivals.differentiable(sequence)
        y = rivals.output(module(leaf))
        torch.manual_seed(1)
        y.backward(torch.randn(y.shape, device=y.device).to(y.dtype))
        grads = [t.grad for t in (values, *module.parameters()) if t.grad is not None]
        return [t.detach().double() for t in (inferred, y, *grads)]

    exact = run(copy.deepcopy(theirs).double(), x.to(torch.float64))
    worst = []
    for module in (ours, theirs):
        found = run(module, x)
        each = [(a - b).norm() / b.norm() for a, b in zip(found, exact, strict=True)]
        worst.append(float(torch.stack(each).max()))  # NaN if any is
    return worst[0], worst[1]


def measure(ours: Callable[[], Any], theirs: Callable[[], Any]) -> dict[str, float]:
    """Medians in ms and the ratio theirs/ours, over interleaved pairs."""
    times = timing.interleave({"ours": ours, "theirs": theirs}, "cuda", 0, PAIRS).times()
    found = timing.compared(times["ours"], times["theirs"])
    kept = {name: found[name] for name in ("ratio", "ratio_p20", "ratio_p80", "ratio_low", "ratio_high")}
    return {"ours_ms": statistics.median(times["ours"]), "theirs_ms": found["ms"], **kept, "pairs": PAIRS}


def peak_memory(call: Callable[[], Any]) -> float:
    """MiB that one call takes beyond what was allocated before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def launches(shape: Shape, device: str = "cuda") -> dict[str, Any]:
    """``runner.launches`` of nn.LSTM, and whether torch has the weights in one piece."""
    theirs, x = rivals.oracle(case_of(shape), device), rivals.make_input(case_of(shape), device)
    chunks = {w.untyped_storage().data_ptr() for w in theirs.parameters()}  # else torch copies them at each call
    found = runner.launches(theirs, x)
    return {"launches": found["count"], "commonest": found["commonest"], "weights_compact": len(chunks) == 1}


def run_row(shape: Shape) -> dict[str, Any]:
    with persistent.over_the_grid() if shape.group == "grid" else nullcontext():
        return _run_row(shape)


def _run_row(shape: Shape) -> dict[str, Any]:
    row: dict[str, Any] = shape._asdict()
    dtype = getattr(torch, case_of(shape).dtype)
    refused = persistent.unavailable() or persistent.refuses(torch.device("cuda", 0), dtype, shape.H)
    if shape.backend == "persistent" and refused is not None:
        return {**row, "refused": refused}
    if shape.backend == "persistent":
        directions = 2 if shape.group == "bidirectional" else 1
        row["plans"] = persistent.plans(torch.device("cuda", 0), dtype, shape.H, shape.B, directions)
    x, theirs, ours = build(shape)
    mode = "inference" if shape.group == "inference" else "forward+backward"
    error, allowed = errors(x, theirs, ours)
    row.update(mode=mode, error=error, nn_lstm_error=allowed)
    eps = 2**-10 if shape.group == "tf32" else torch.finfo(dtype).eps
    if not error <= 2 * allowed + eps:  # NaN included
        return {**row, "wrong": f"relative error {error:.2e}, nn.LSTM's {allowed:.2e}"}
    mine, rival = rivals.task(ours, x, mode), rivals.task(theirs, x, mode)
    row.update(measure(mine, rival))
    row["us_per_step"] = 1e3 * row["ours_ms"] / shape.T
    row["peak_mib"], row["nn_lstm_peak_mib"] = peak_memory(mine), peak_memory(rival)
    return row


def attempt(call: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What the call returns, or how it failed: one shape's fault must not take the others'."""
    try:
        return call(*arguments)
    except Exception as error:
        with suppress(RuntimeError):  # of a card that is lost
            torch.cuda.empty_cache()
        return {"failed": f"{type(error).__name__}: {error}"[:500]}


def lost() -> bool:
    """Whether a fault on the card ended this process's use of it."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def phases(module: nn.Module, x: Tensor) -> dict[str, Callable[[], Any]]:
    """One call each: inference, a forward pass that saves state, and a backward pass to input and parameters."""
    x = x.detach().requires_grad_()
    y = module(x)[0]
    dy = torch.randn_like(y)
    wanted = [x, *module.parameters()]
    return {
        "inference": rivals.task(module, x, "inference"),
        "forward": lambda: module(x),
        "backward": lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True),
    }


def run_modules() -> dict[str, Any]:
    """The phases of both modules, bf16, input product included: one call alone, whose launches the card waits for, and
    of QUEUED calls in a row."""
    T, B, H = STEP_SHAPE
    x, theirs, ours = build(Shape("bf16", T, B, H))
    mine, rival = phases(ours, x), phases(theirs, x)
    found: dict[str, Any] = {"T": T, "B": B, "H": H, "dtype": "bf16"}
    for name in mine:
        times = measure(mine[name], rival[name])
        queued = measure(in_a_row(mine[name]), in_a_row(rival[name]))
        found[name] = {**times, "us_per_step": 1e3 * times["ours_ms"] / T}
        found[name]["queued"] = {**queued, "us_per_step": 1e3 * queued["ours_ms"] / QUEUED / T}
    return found


def in_a_row(call: Callable[[], Any]) -> Callable[[], None]:
    """QUEUED calls."""

    def calls() -> None:
        for _ in range(QUEUED):
            call()

    return calls


def run_kernels(device: str = "cuda") -> dict[str, Any]:
    """Microseconds a step of the kernels alone, without the input product: inference, forward and backward."""
    T, B, H = STEP_SHAPE
    place: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    state = [torch.randn(1, B, H, **place) for _ in range(4)]
    w = [torch.randn(4 * H, H, **place) / H**0.5]
    biases = [(torch.randn(4 * H, **place), torch.randn(4 * H, **place))]
    start = torch.randn(T * B, 4 * H, **place)
    y, dy, dgates = torch.empty(T * B, H, **place), torch.randn(T * B, H, **place), torch.empty_like(start)
    cells = torch.empty(1, T * B, H, device=device)
    gates, steps = start.clone(), [B] * T

    def forward(saved: Tensor | None) -> None:
        persistent.recurrence_forward(gates, state[0], state[1], w, biases, steps, y, state[2], state[3], saved)

    def backward() -> None:
        persistent.recurrence_backward(gates, cells, state[1], w, steps, dy, None, None, dgates, None, None)

    found: dict[str, Any] = {"T": T, "B": B, "H": H, "dtype": "bf16"}
    for name, call in (
        ("inference", lambda: forward(None)),
        ("forward", lambda: forward(cells)),
        ("backward", backward),
    ):
        timer, times = timing.timer("cuda", call), []
        for _ in range(3 + PAIRS):
            gates.copy_(start) if name != "backward" else gates.copy_(start.sigmoid())
            times.append(1e3 * timer() / T)
        found[name] = {"us_per_step": statistics.median(times[3:])}
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """One line a row, then the geometric mean of each group beside what is asked of it."""
    lines = []
    for r in rows:
        head = f"{r['group']:13} {r['backend']:10} T{r['T']:<5} B{r['B']:<4} H{r['H']:<5}"
        if "ratio" not in r:
            lines.append(f"{head} " + "; ".join(f"{n}: {r[n]}" for n in ("refused", "wrong", "failed") if n in r))
            continue
        lines.append(
            f"{head}{r['ours_ms']:9.3f} ms {r['us_per_step']:7.2f} us/step  nn.LSTM {r['theirs_ms']:9.3f} ms  "
            f"{r['ratio']:5.2f}x ({r['ratio_p20']:.2f}..{r['ratio_p80']:.2f})  "
            f"{r['peak_mib']:.0f} and {r['nn_lstm_peak_mib']:.0f} MiB, "
            f"{r.get('nn_lstm', {}).get('launches', '?')} launches"
        )
    for name, group in GROUPS.items():
        of_group = [r for r in rows if r["group"] == name]
        ratios = [r["ratio"] for r in of_group if "ratio" in r]
        if ratios:
            asked = "" if group.floor is None else f" (floor {group.floor}, aim {group.aim})"
            without = f", {len(of_group) - len(ratios)} without a ratio" if len(ratios) < len(of_group) else ""
            mean = statistics.geometric_mean(ratios)
            lines.append(f"{group.what}: {mean:.2f}x over {len(ratios)} rows{without}{asked}")
    return "\n".join(lines)


def readme_table(record: dict[str, Any]) -> str:
    """The README's table of a recorded gpu-check: a line for each group of which something is asked, and inference."""
    found, modules = record["bench"], record["bench"]["modules"]
    step = ", ".join(
        f"{name} {modules[name]['us_per_step']:.2f} µs ({modules[name]['ratio']:.1f}×)"
        for name in ("inference", "forward", "backward")
    )
    place = f"T = {modules['T']}, B = {modules['B']}, H = {modules['H']}, {modules['dtype']}"
    lines = [
        "How many times as long torch.nn.LSTM takes with cuDNN as the persistent kernels, even where `auto` would not "
        "take them, input product included: the geometric mean, and the least and the most of a group's shapes "
        "(T 256 to 2048, B 2 to 128, H 256 to 1024), each the median of interleaved pairs. "
        f"{record['gpu']}, torch {record['torch']}, driver {record['driver']}, commit {record['commit'][:9]}. "
        f"A step at {place}: {step}.",
        "",
        "| | nn.LSTM's time / ours |",
        "| --- | --- |",
    ]
    for name, group in GROUPS.items():
        ratios = [row["ratio"] for row in found["rows"] if row["group"] == name and "ratio" in row]
        if ratios and (group.floor is not None or name == "inference"):
            mean, least, most = statistics.geometric_mean(ratios), min(ratios), max(ratios)
            lines.append(f"| {group.what} | {mean:.2f}× ({least:.2f}..{most:.2f}) |")
    return "\n".join(lines) + "\n"


def steps(record: dict[str, Any]) -> str:
    """The time of a step beside what is asked of it: of the modules, then of the kernels without the input product."""
    lines = []
    for what in ("modules", "kernels"):
        found = record.get(what, {})
        if "failed" in found:
            lines.append(f"{what}: {found['failed']}")
        for name in (name for name in ("inference", "forward", "backward") if name in found):
            line = (
                f"{what:8} T{found['T']} B{found['B']} H{found['H']} {name:9} {found[name]['us_per_step']:6.2f} us/step"
            )
            if "ratio" in found[name]:
                line += f", nn.LSTM {1e3 * found[name]['theirs_ms'] / found['T']:.2f}, {found[name]['ratio']:.2f}x"
            if "queued" in found[name]:
                queued = found[name]["queued"]
                line += f"; {QUEUED} calls in a row {queued['us_per_step']:.2f}, {queued['ratio']:.2f}x"
            if what == "modules" and name in STEP:
                line += f" (floor {STEP[name][0]}, aim {STEP[name][1]})"
            lines.append(line)
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="where rows go, a line of JSON each")
    parser.add_argument("--seconds", type=float, default=180, help="no row starts later than this")
    args = parser.parse_args(arguments)
    torch.backends.cudnn.allow_tf32 = True
    end = time.monotonic() + args.seconds
    records = read(args.output)
    with args.output.open("a") as file:

        def write(record: dict[str, Any]) -> None:
            file.write(json.dumps(record) + "\n")
            file.flush()
            records.append(record)

        for name, call in (("kernels", run_kernels), ("modules", run_modules)):
            if any(name in record for record in records):
                continue
            write({name: attempt(call)})
            print(steps(records[-1]), flush=True)
            if "failed" in records[-1][name] and lost():
                return LOST
        for shape in left_out(rows_of(records)):
            if time.monotonic() > end:
                break
            row = {**shape._asdict(), **attempt(run_row, shape)}
            write({"row": row})
            print(table([row]).splitlines()[0], flush=True)
            if "failed" in row and lost():
                return LOST
        for row in rows_of(records):
            shape = Shape(*(row[field] for field in Shape._fields))
            if "ratio" in row and "nn_lstm" not in row and time.monotonic() < end + COUNTING:
                write({"nn_lstm": attempt(launches, shape), "of": shape})  # a profiler that is barred costs no timings
    judged = [found for record in records for name, found in record.items() if name in ("kernels", "modules", "row")]
    return 1 if any("wrong" in found or "failed" in found for found in judged) else 0


def read(output: Path) -> list[dict[str, Any]]:
    """The records of a file of rows, if there is one."""
    return [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []


def rows_of(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, each with what nn.LSTM launches where that was counted."""
    counted = {Shape(*record["of"]): {"nn_lstm": record["nn_lstm"]} for record in records if "of" in record}
    rows = [record["row"] for record in records if "row" in record]
    return [{**row, **counted.get(Shape(*(row[field] for field in Shape._fields)), {})} for row in rows]


def left_out(rows: list[dict[str, Any]]) -> list[Shape]:
    """The shapes without a row."""
    known = {tuple(row.get(name) for name in Shape._fields) for row in rows}
    return [shape for shape in shapes() if shape not in known]


if __name__ == "__main__":
    sys.exit(main())
