"""``python -m benchmarks.gpu_check``: latencies, the GPU tests, a memory check and benchmarks on the GPU at hand.

Builds nothing. Each part runs in a process of its own and within its own time, so that a kernel that hangs costs one
part. Prints a table and writes one JSON, results/gpu-<name>.json, anew after each part; what a part finds lies beside
it until then, for the case that this process is stopped too. Exit code 0 if all is well, 1 if a part fails or a GPU
backend is missing, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import lstm_fast
from benchmarks import gpu_bench
from lstm_fast import files
from lstm_fast.bench import exchange
from lstm_fast.bench.process import run
from lstm_fast.bench.report import put_between
from lstm_fast.bench.runner import describe
from lstm_fast.cli import MISSING
from lstm_fast.kernels import persistent

ROOT = Path(__file__).parents[1]
BACKENDS = ("persistent", "cuda", "triton")
OVER_THE_GRID = "persistent over-the-grid"  # without clusters
SECONDS = {"tests": 200, "sanitizer": 60, "bench": 120, "suite": 240}  # nine minutes with the build, if none hangs
LAST_ROW = 40  # seconds that the bench has for the row that it is in when its time ends
ONE_TEST = 40  # seconds
MOST_FAILED = 40  # tests: if each hangs until its kernel gives up, there is no time for more
MARKERS = ("<!-- gpu table: begin -->", "<!-- gpu table: end -->")  # of the README
USUAL = 512  # hidden units that every card holds which the persistent kernels are for

# Odd and vectorised sizes, both directions, two layers, several tiles.
SMALL_CASE = """
import contextlib, sys, torch, lstm_fast
from lstm_fast.kernels import persistent
backend, _, over_the_grid = sys.argv[1].partition(" ")
with persistent.over_the_grid() if over_the_grid else contextlib.nullcontext():
    for dtype in (torch.float32, torch.bfloat16):
        for hidden, batch in ((33, 11), (64, 11), (64, 301)):  # tiles of few sequences, and full ones in turns
            module = lstm_fast.LSTM(5, hidden, 2, bidirectional=True, device="cuda", dtype=dtype, backend=backend)
            module(torch.randn(4, batch, 5, device="cuda", dtype=dtype))[0].sum().backward()
    torch.cuda.synchronize()
"""


def run_tests(result: Path) -> dict[str, Any]:
    """The tests marked gpu, test_gpu*.py first; each that was skipped is told with its reason."""
    failures = result.with_suffix(".failures.txt")
    failures.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-rfEs", "-m", "gpu", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-o", "faulthandler_timeout=60"]  # shows where a test hangs
    command += [f"--maxfail={MOST_FAILED}", f"--failures-to={failures}"]
    files = sorted((ROOT / "tests").glob("test_*.py"), key=lambda path: (not path.name.startswith("test_gpu"), path))
    command += [str(path) for path in files]
    if importlib.util.find_spec("xdist"):
        command += ["-n", "8"]
        if importlib.util.find_spec("pytest_timeout"):  # a thread ends the worker, even inside a call of the driver
            command += [f"--timeout={ONE_TEST}", "--timeout-method=thread"]
    code, output = run(command, SECONDS["tests"], ROOT, OMP_NUM_THREADS="1")
    lines = output.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    skipped = [line for line in lines if line.startswith("SKIPPED")]
    print("\n".join(lines[-60:] if code != 0 else skipped))
    ended = lines[-1] if lines else ""
    summary = ended if code is not None else stopped("tests", ended)
    found = {"ok": code == 0, "summary": summary, "failed": failed, "skipped": skipped}
    if failures.exists():  # a run that was stopped has printed none of them
        found["failures"] = failures.read_text()[:200000]
        failures.unlink()
    return found if code == 0 else {**found, "output": output[-20000:]}


def run_sanitizer(_: Path) -> dict[str, Any]:
    """compute-sanitizer over a small case of each backend, all at once, where it is installed.

    What racecheck says of clusters is told and not judged: nothing says that it knows of messages between blocks.
    """
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        return {"ok": True, "summary": "skipped: compute-sanitizer is not installed"}
    checks = [
        *(("memcheck", backend) for backend in (*BACKENDS, OVER_THE_GRID)),
        *((check, how) for check in ("synccheck", "racecheck") for how in ("persistent", OVER_THE_GRID)),
    ]

    def sanitize(check: str, backend: str) -> tuple[bool, str]:
        command = [tool, f"--tool={check}", "--error-exitcode=9"]
        if check == "memcheck":
            command.append("--report-api-errors=no")
        command += [sys.executable, "-c", SMALL_CASE, backend]
        # each tensor in an allocation of its own, so that memcheck sees its ends
        code, output = run(command, SECONDS["sanitizer"], ROOT, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        if "Device not supported" in output:
            return True, f"{check} of {backend}: skipped, the tool doesn't support this device"
        ended = {0: "no errors", None: f"unfinished after {SECONDS['sanitizer']} s"}.get(code, output[-2000:])
        judged = (check, backend) != ("racecheck", "persistent")
        return code in (0, None) or not judged, f"{check} of {backend}: {ended}"

    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda each: sanitize(*each), checks))
    return {"ok": all(well for well, _ in found), "summary": "; ".join(said for _, said in found)}


def run_bench(result: Path) -> dict[str, Any]:
    """What benchmarks.gpu_bench measured within its time, by further processes after one that lost the card."""
    end = time.monotonic() + SECONDS["bench"]
    output = result.with_suffix(".rows.jsonl")
    output.unlink(missing_ok=True)
    code: int | None = gpu_bench.LOST
    while code == gpu_bench.LOST and time.monotonic() < end:
        seconds = end - time.monotonic()
        command = [sys.executable, "-m", "benchmarks.gpu_bench", "--output", str(output), "--seconds", str(seconds)]
        code, said = run(command, seconds + LAST_ROW, ROOT)
    records = gpu_bench.read(output)
    output.unlink(missing_ok=True)
    rows = gpu_bench.rows_of(records)
    found: dict[str, Any] = {"ok": code == 0, "rows": rows}
    found["left_out"] = [shape._asdict() for shape in gpu_bench.left_out(rows)]
    for record in records:
        found.update({name: record[name] for name in ("kernels", "modules") if name in record})
    lines = [gpu_bench.table(rows), gpu_bench.steps(found)]
    if found["left_out"]:
        names = (" ".join(str(value) for value in shape.values()) for shape in found["left_out"])
        lines.append(f"left out (group T B H backend): {', '.join(names)}")
    if code != 0:
        lines.append(said[-2000:] if code is not None else stopped("bench", said[-500:]))
    found["summary"] = "\n".join(line for line in lines if line)
    return found


def run_suite(result: Path) -> dict[str, Any]:
    """``lstm-fast bench`` and ``bench train`` as users run them, each record in a file of its own beside the result."""
    commands = {  # the record that a table is made of comes first: who comes last may run out of time
        "tune": ["--grid", "tune-gpu", "--backend", "persistent", "--rivals", "torch", "--seconds", "0.1"],
        "flashrnn": ["--grid", "flashrnn", "--dtype", "bfloat16", "--seconds", "0.2"],
        "train": ["train"],
    }
    end = time.monotonic() + SECONDS["suite"]
    ok, lines = True, []
    for name, arguments in commands.items():
        output = result.with_name(f"{result.stem}-{name}.json")
        command = [sys.executable, "-m", "lstm_fast.cli", "bench", *arguments, "--out", str(output)]
        code, said = run(command, max(end - time.monotonic(), LAST_ROW), ROOT)
        if code == 2 and MISSING in said:
            lines.append(f"{name}: skipped: {said.strip()}")
            continue
        ok = ok and code == 0
        lines += [said, str(output)] if code is not None else [stopped("suite", said[-500:]), files.stopped(output)]
    return {"ok": ok, "summary": "\n".join(lines)}


def stopped(part: str, ended: str) -> str:
    return f"stopped at its limit of {SECONDS[part]} s; the last it said: {ended}"


def persistent_refuses() -> str | None:
    """Why a usual layer isn't served, which would leave tests skipped and rows refused; None if it is."""
    try:
        return persistent.refuses(torch.device("cuda", torch.cuda.current_device()), torch.bfloat16, USUAL)
    except RuntimeError as error:  # of the card
        return str(error)


# Each is told where the result goes, beside which it may keep what it has so far.
PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "exchange": lambda _: exchange.measure(),
    "tests": run_tests,
    "sanitizer": run_sanitizer,
    "bench": run_bench,
    "suite": run_suite,
}


def parts(text: str) -> list[str]:
    """A comma-separated choice of PARTS."""
    found = text.split(",")
    unknown = [part for part in found if part not in PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"parts should be among {', '.join(PARTS)}, got: {', '.join(unknown)}")
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=parts, default=list(PARTS), help=f"default: {','.join(PARTS)}")
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    parser.add_argument("--readme", type=Path, help="only write this README's table anew, from the JSON at --output")
    args = parser.parse_args(arguments)
    if args.readme is not None:
        if args.output is None:
            parser.error("--readme needs --output, the JSON of a run")
        put_between(args.readme, MARKERS, gpu_bench.readme_table(json.loads(args.output.read_text())))
        return 0
    if not torch.cuda.is_available():
        print(f"gpu-check needs an NVIDIA GPU, and torch {torch.__version__} finds none", file=sys.stderr)
        return 2
    status = lstm_fast.backends()
    record: dict[str, Any] = {**describe("cuda"), "backends": {name: status[name].detail for name in BACKENDS}}
    missing = {name: status[name].detail for name in BACKENDS if not status[name].available}
    refused = persistent_refuses() if "persistent" not in missing else None
    if refused is not None:
        missing["persistent"] = refused
    for name, detail in missing.items():
        print(f"{name} is missing: {detail}")
    slug = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    path = args.output or ROOT / "benchmarks" / "results" / f"gpu-{slug}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    ok = not missing
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # else a part would stay on the card when this is stopped
    for part in args.parts:
        try:
            record[part] = PARTS[part](path)
        except Exception as error:  # one part's fault must not take the others' results
            record[part] = {"ok": False, "summary": f"{type(error).__name__}: {error}"}
        ok = ok and record[part]["ok"]
        print(f"{part}: {record[part]['summary']}", flush=True)
        files.write(path, record)
    print(path)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
