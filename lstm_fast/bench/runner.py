"""How a grid is measured: a correctness gate, then interleaved rounds, each row written down as soon as it is known.

The grid is walked several times, a few rounds of each case at a time, so that what else happens on a machine for some
seconds or a minute falls on few rounds of many cases, where medians pass over it, and not on all rounds of a few. On a
CPU, a round waits until a witness isn't slowed down, and rows that lack such rounds are measured again. Those count
that took little longer than the shortest.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import lstm_fast
from lstm_fast import files
from lstm_fast.bench import memory, rivals
from lstm_fast.bench.cases import Case, Grid
from lstm_fast.bench.limits import Limits, measure
from lstm_fast.bench.timing import FEWEST_OF_A_PASS, Rounds, Witness, compared, interleave, spread
from lstm_fast.environment import cpuinfo, environment
from lstm_fast.measured import FEWEST_ROUNDS

# of nn.LSTM's result in the same dtype, by norm: rounding in another order; TF32's where a GPU computes fp32 so
TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 3e-2, "float16": 5e-3}
TF32 = 3e-3
PASSES = 3
_PATIENCE = 3.0  # seconds that another waits for rest when its turn comes again
_WATCHED = 3  # times as long as a case takes, how fast the machine is
LAUNCHES_T = 64  # cuDNN's choice doesn't depend on T from 20 steps on: launches are counted over a shorter call


class WrongResultError(RuntimeError):
    """A module's result isn't torch's."""


class RefusedError(RuntimeError):
    """The backend that was asked for can't serve a case."""


def commit() -> str:
    """The checkout's commit, with "+changes" if tracked files differ from it; "unknown" outside a checkout."""
    root, this = Path(__file__).parent, Path(__file__).name
    try:  # an installed copy may lie in some other project's checkout
        subprocess.run(["git", "ls-files", "--error-unmatch", this], cwd=root, capture_output=True, check=True)
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        changes = subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=root, check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+changes" if changes else "")


def _ask_gpu(what: str) -> list[str]:
    """Of the first GPU, in nvidia-smi's words; nothing where there is none that says it."""
    tool = shutil.which("nvidia-smi")
    if not torch.cuda.is_available() or tool is None:
        return []
    query = [tool, f"--query-gpu={what}", "--format=csv,noheader"]
    said = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")[0]
    return [part.strip() for part in said.split(",") if part.strip()]


def usual_device() -> str:
    """ "cuda" where there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def state(device: str) -> dict[str, Any]:
    """What varies on a machine: its load, and as far as the system tells them the clocks of the GPU's multiprocessors
    and memory, or of the CPU."""
    if device == "cuda":
        clocks = _ask_gpu("clocks.sm,clocks.mem")
    else:
        cores = [float(mhz) for mhz in re.findall(r"cpu MHz\s*: ([\d.]+)", cpuinfo())]
        clocks = [f"{statistics.mean(cores):.0f} MHz"] if cores else []
    return {"load": os.getloadavg()[0], "clocks": clocks}


def describe(device: str) -> dict[str, Any]:
    """Machine, versions, commit, date, a GPU's driver, and ``state`` as it is, ready for JSON."""
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    found: dict[str, Any] = {"date": date, "commit": commit(), **environment(), **state(device)}
    with suppress(importlib.metadata.PackageNotFoundError):
        found["triton"] = importlib.metadata.version("triton")
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    if driver := _ask_gpu("driver_version"):
        found["driver"] = driver[0]
    return found


def check(case: Case, modules: dict[str, nn.Module], oracle: nn.Module, x: Any) -> dict[str, float]:
    """The relative distance, by norm, of each module's results from the oracle's: the largest of that of y, of x's
    gradient and of those of weights with the oracle's names.

    Raises:
        WrongResultError: it is above ``TOLERANCE``, or not a number.
    """

    def results(module: nn.Module) -> list[Tensor]:
        leaf, values = rivals.differentiable(x)
        names = [name for name, _ in oracle.named_parameters()]
        weights = [p for name, p in module.named_parameters() if name in names]
        y = rivals.output(module(leaf))
        torch.manual_seed(2)
        dy = torch.randn(y.shape, device=y.device).to(y.dtype)
        return [y.detach(), *torch.autograd.grad(y, [values, *weights], dy)]

    right = results(oracle)
    tf32 = right[0].is_cuda and case.dtype == "float32" and torch.backends.cudnn.allow_tf32
    allowed, found = TF32 if tf32 else TOLERANCE[case.dtype], {}
    for name, module in modules.items():
        got = results(module)
        pairs = zip(got, right[: len(got)], strict=True)
        found[name] = max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs)
        if not found[name] <= allowed:  # NaN included
            raise WrongResultError(f"{name} differs from torch by {found[name]:.1e} in norm, more than {allowed:.0e}")
    return found


class Measured(NamedTuple):
    """One case in one mode."""

    group: str
    case: Case
    mode: str
    choice: str
    error: float
    rows: int  # over all steps
    rounds: Rounds

    def lacks_rounds(self) -> bool:
        """Whether others disturbed all or most of them."""
        return not self.rounds.rested() or len(self.rounds.counted()) < min(FEWEST_ROUNDS, len(self.rounds.every()))

    def row(self, limits: Limits) -> dict[str, Any]:
        """What is said of it."""
        times = self.rounds.times()
        ours = times.pop("ours")
        mine = spread(ours)
        against = {name: compared(ours, theirs) for name, theirs in times.items()}
        best = min(against, key=lambda name: against[name]["ms"], default=None)
        limit, what = limits.of(self.case, self.rows, self.mode)
        return {
            "group": self.group,
            **self.case._asdict(),
            "mode": self.mode,
            "choice": self.choice,
            "error": self.error,
            "rounds": len(ours),
            "disturbed": not self.rounds.rested(),
            "ours": mine,
            "rivals": against,
            "best_rival": best,
            "ratio": against[best]["ratio"] if best is not None else None,
            "us_per_step": 1e3 * mine["ms"] / self.case.T,
            "gflops": self.case.flops(self.rows, self.mode) / mine["ms"] / 1e6,
            "gbytes_per_s": self.case.bytes(self.rows, self.mode) / mine["ms"] / 1e6,
            "limit_ms": limit,
            "limit": what,
            "share": limit / mine["ms"],
        }


def time_case(
    known: list[Measured],
    group: str,
    case: Case,
    modes: Sequence[str],
    names: Sequence[str],
    device: str,
    seconds: float,
    backend: str,
    witness: Witness | None,
    again: bool = False,
) -> None:
    """Rounds for ``seconds`` more in each mode, or ``again`` in those that lack some, added to ``known``; where that is
    empty, a gate before the first.

    Raises:
        RefusedError: ``backend`` can't serve the case.
        WrongResultError: ours or a rival's result isn't torch's.
    """
    oracle, x = rivals.oracle(case, device), rivals.make_input(case, device)
    served = [name for name in names if rivals.RIVALS[name].refuses(case, device) is None]
    theirs = {name: rivals.RIVALS[name].build(case, oracle) for name in served}
    modules = {"ours": rivals.ours(case, oracle, backend), **theirs}
    if not known:
        try:
            choices = {mode: choice(modules["ours"], x, mode) for mode in modes}
        except RuntimeError as error:
            raise RefusedError(str(error)) from error
        found, rows = check(case, modules, oracle, x), x.data.size(0) if case.packed else case.T * case.B
        for mode in modes:
            known.append(Measured(group, case, mode, choices[mode], found["ours"], rows, Rounds([], [])))
    fewest, patience = (0, _PATIENCE) if again else (FEWEST_OF_A_PASS, seconds)  # quiet ones alone, or of any kind
    for each in known:
        if again and not each.lacks_rounds():
            continue
        tasks = {name: rivals.task(module, x, each.mode, case.last) for name, module in modules.items()}
        more = interleave(tasks, device, seconds, fewest, witness, patience)
        each.rounds.quiet.extend(more.quiet)
        each.rounds.disturbed.extend(more.disturbed)


def choice(module: nn.Module, x: Any, mode: str) -> str:
    """``explain`` as the mode calls the module."""
    with torch.set_grad_enabled(mode != "inference"):
        return lstm_fast.explain(module, x)


def launches(module: nn.Module, x: Any) -> dict[str, Any]:
    """How many kernels one inference launches, and the commonest: which algorithm cuDNN really ran. Of a dense x, the
    first LAUNCHES_T steps."""
    x = x[:LAUNCHES_T] if isinstance(x, Tensor) and x.dim() == 3 else x
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        module(x)
        torch.cuda.synchronize()
    kernels = [e for e in profile.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels.sort(key=lambda e: -e.count)
    return {"count": sum(e.count for e in kernels), "commonest": [e.key[:80] for e in kernels[:3]]}


def run(
    name: str,
    grid: Grid,
    modes: Sequence[str],
    names: Sequence[str],
    device: str,
    seconds: float,
    output: Path,
    progress: Callable[[int, int, str], None],
    backend: str = "auto",
) -> dict[str, Any]:
    """Every case of the grid, ours by ``backend``, in ``PASSES`` passes over it, and in more over those rows that lack
    quiet rounds, for as long again at most. After each case, ``files.unfinished(output)`` holds all that is known, in
    the end ``output``; under "passes", the state and the limits of the machine before each.

    ``progress(done, total, what)`` is told before each case. A rival that is missing is named under "skipped", as is a
    case that ``backend`` can't serve; one that fails under "failed"; each with its reason.
    """
    unfinished = files.unfinished(output)
    missing = {rival: why for rival in names if (why := rivals.RIVALS[rival].missing()) is not None}
    present = [rival for rival in names if rival not in missing]
    record: dict[str, Any] = {
        **describe(device),
        "grid": name,
        "device": device,
        "limits": {},
        "passes": [],
        "startup": memory.startup(device, torch.get_num_threads()),
        "skipped": missing,
        "rows": [],
        "failed": [],
    }
    cases = [(group, case) for group in grid for case in grid[group]]
    known: list[list[Measured]] = [[] for _ in cases]
    going = set(range(len(cases)))
    limits: Limits | None = None
    after = len(grid) + (device == "cuda")  # steps: memory of a case a group, launches
    total = PASSES * len(cases) + after
    witness = Witness(_WATCHED * seconds) if device == "cpu" else None
    for number, places in enumerate(_passes(known, going)):
        found = measure(device, limits)
        limits = found if limits is None else found.best(limits)
        record["limits"] = limits._asdict()
        record["passes"].append({**state(device), "limits": found._asdict()})
        for at in places:
            group, case = cases[at]
            total = max(PASSES, number + 1) * len(cases) + after
            progress(number * len(cases) + at, total, case.label())
            again = number >= PASSES
            try:
                time_case(known[at], group, case, modes, present, device, seconds / PASSES, backend, witness, again)
            except RefusedError as error:
                going.remove(at)
                record["skipped"][case.label()] = str(error)
            except (RuntimeError, torch.OutOfMemoryError) as error:
                going.remove(at)
                record["failed"].append({"group": group, **case._asdict(), "why": str(error).split("\n")[0]})
            timed = [each for of_case in known for each in of_case if each.rounds.every()]
            record["rows"] = [each.row(limits) for each in timed]
            record["rounds_left_out"] = sum(len(each.rounds.every()) for each in timed) - sum(
                row["rounds"] for row in record["rows"]
            )
            files.write(unfinished, record)
    record["after"] = state(device)
    for step, group in enumerate(grid, total - after):
        case = max(grid[group], key=lambda case: case.T * case.B * case.H)
        progress(step, total, f"memory of {case.label()}")
        for row in record["rows"]:
            if (row["group"], Case.of(row), row["mode"]) == (group, case, "forward+backward"):
                row["memory_mb"] = memory.peak(case, device, backend, torch.get_num_threads())
                files.write(unfinished, record)
    if device == "cuda":
        progress(total - 1, total, "torch.nn.LSTM's launches")
        count_launches(record["rows"], device)
    files.write(unfinished, record)
    files.finish(output)
    progress(total, total, "done")
    return record


def _passes(known: list[list[Measured]], going: set[int]) -> Iterator[list[int]]:
    """The places in ``known`` that each pass measures, of those ``going``: all, then those that lack rounds, which ends
    after as long again."""
    begin = time.monotonic()
    for _ in range(PASSES):
        yield sorted(going)
    end = 2 * time.monotonic() - begin
    while time.monotonic() < end:
        lacking = [at for at in sorted(going) if any(each.lacks_rounds() for each in known[at])]
        if not lacking:
            break
        yield lacking


def count_launches(rows: list[dict[str, Any]], device: str) -> None:
    """Notes in each row what torch.nn.LSTM launches: when all is timed, since a profiler may stay and slow down what
    comes after it."""
    for row in rows:
        if "torch" in row["rivals"]:
            case = Case.of(row)
            row["launches"] = launches(rivals.oracle(case, device), rivals.make_input(case, device))
