"""Recorded runs as text, as the README's table and as plots, and what got slower between two of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from math import inf, log, nan, sqrt
from pathlib import Path
from statistics import geometric_mean
from textwrap import fill
from typing import TYPE_CHECKING, Any, Literal

from lstm_fast import files
from lstm_fast.bench.cases import Case
from lstm_fast.bench.limits import Limits, gflops

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Run = dict[str, Any]
Row = dict[str, Any]
Rows = dict[tuple[int, int, int], Row]  # by T, B and H

MARKERS = ("<!-- table: begin -->", "<!-- table: end -->")
README_MODES = ("inference", "forward+backward")

_RUN_KEYS = ("date", "commit", "cpu", "torch", "threads", "grid", "device", "skipped", "rows", "failed")
_TIMES = ("ms", "p20", "p80")
_RATIOS = ("ms", "ratio", "ratio_low", "ratio_high")
_RATES = ("us_per_step", "gflops", "gbytes_per_s")
_CASE_KEYS = [field for field in Case._fields if field != "last"]
_ROW_KEYS = ("group", *_CASE_KEYS, "mode", "ours", "rivals", "best_rival", "ratio", *_RATES)
_HEADS = ("case", "mode", "ms", "rival", "its ms", "ratio", "95 %", "µs/step", "GFLOP/s", "GB/s", "of the limit")
_LEFT = ("case", "mode", "rival")
_REGIMES = {"bytes": "#dbe9f6", "flops": "#fde5d3", "exchange": "#dff0d8"}  # background colours
_STYLES: dict[Literal["-", "--", ":"], str] = {"-": "lstm_fast", "--": "torch", ":": "limit"}
_LETTERS = 10  # of a title to an inch
_MARGIN = 1.2  # of the smallest and largest x to the frame, as a factor


class ReportError(ValueError):
    """A file isn't a recorded run, or runs don't go together; the message is one sentence."""


def load(path: Path) -> Run:
    """A run that ``lstm-fast bench`` wrote.

    Raises:
        ReportError: it isn't one.
    """
    try:
        run: Run = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON or of UTF-8
        raise ReportError(f"{path} is not a run that `lstm-fast bench` recorded: it is not JSON ({error})") from error
    flaw = next(_flaws(run), None)
    if flaw is not None:
        raise ReportError(f"{path} is not a run that `lstm-fast bench` recorded: {flaw}")
    with understood(path):
        return _with_limits(run) if run.get("limits") else run


@contextmanager
def understood(*paths: Path) -> Iterator[None]:
    """Where values of runs are used for something.

    Raises:
        ReportError: one of them, which nothing looked at before, is of no use.
    """
    try:
        yield
    except ReportError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        why = f"its values can't be used ({type(error).__name__}: {error})"
        names = " or ".join(map(str, paths))
        raise ReportError(f"{names} is not a run that `lstm-fast bench` recorded: {why}") from error


def _with_limits(run: Run) -> Run:
    """Each row beside the limit as it is understood today: older runs took the rate of multiply-adds for AMX's too."""
    instruction_set = run["cpu"].rpartition(" with ")[2] if run["device"] == "cpu" else ""
    limits = Limits(*(run["limits"][name] for name in Limits._fields))
    limits = limits._replace(gflops=gflops(limits.gflops, instruction_set))
    rows = []
    for row in run["rows"]:
        case, ms = Case.of(row), row["ours"]["ms"]
        count = round(row["gflops"] * ms * 1e6 / case.flops(1, row["mode"]))
        limit_ms, limit = limits.of(case, count, row["mode"])
        rows.append({**row, "limit_ms": limit_ms, "limit": limit, "share": limit_ms / ms})
    return {**run, "limits": limits._asdict(), "rows": rows}


def table(run: Run) -> str:
    """Every row beside its best rival, and geometric means by group and mode; then what wasn't measured, and why."""
    lines = [f"{run['grid']}: {run['date']}, {_threads(run['threads'])}, {_origin(run)}", *_machine_lines(run)]
    cells = [_HEADS, *map(_cells, run["rows"])]
    pads = [("<" if head in _LEFT else ">") + str(max(map(len, c))) for head, *c in zip(_HEADS, *cells, strict=True)]
    head, *texts = ("  " + "  ".join(map(format, each, pads)).rstrip() for each in cells)
    for group in dict.fromkeys(row["group"] for row in run["rows"]):
        rows = [row for row in run["rows"] if row["group"] == group]
        lines += ["", group, head, *(t for t, row in zip(texts, run["rows"], strict=True) if row["group"] == group)]
        for mode in dict.fromkeys(row["mode"] for row in rows):
            ratios = [row["ratio"] for row in rows if row["mode"] == mode and row["ratio"] is not None]
            if ratios:
                lines.append(f"  geometric mean, {mode}: {_summary(ratios)}")
        for row in rows:
            backend, _, why = row.get("choice", "").partition(": ")
            if backend == "torch":
                lines.append(f"  left to torch: {Case.of(row).label()}, {row['mode']}: {why}")
        for row in rows:
            sizes = [f"{side} {_number(size)} MB" for side, size in row.get("memory_mb", {}).items()]
            lines += [f"  peak memory of {Case.of(row).label()}, {row['mode']}: {', '.join(sizes)}"] * bool(sizes)
    lines += [""] * bool(run["skipped"] or run["failed"])
    lines += [f"skipped {rival}: {why}" for rival, why in run["skipped"].items()]
    for row in run["failed"]:  # without a mode where all failed at once
        lines.append(f"failed {Case.of(row).label()}{', ' + row['mode'] if 'mode' in row else ''}: {row['why']}")
    return "\n".join(lines)


def readme_table(runs: Sequence[Run]) -> str:
    """The README's table, in Markdown: a line a group, a column a mode and number of threads.

    Raises:
        ReportError: the runs are of different machines, torch versions or commits.
    """
    about = {"machine": {*map(_machine, runs)}, **{key: {run[key] for run in runs} for key in ("torch", "commit")}}
    differ = [f"{what} ({', '.join(sorted(found))})" for what, found in about.items() if len(found) > 1]
    if differ:
        raise ReportError(f"a table needs runs of one machine, torch and commit; they differ in {' and '.join(differ)}")
    columns = [(mode, threads) for mode in README_MODES for threads in sorted({run["threads"] for run in runs})]
    heads = [f"{mode}, {_threads(threads)}" for mode, threads in columns]
    ratios: dict[str, dict[tuple[str, int], list[float]]] = {}
    for run in runs:
        for row in run["rows"]:
            if "torch" in row["rivals"]:
                cells = ratios.setdefault(row["group"], {})
                cells.setdefault((row["mode"], run["threads"]), []).append(row["rivals"]["torch"]["ratio"])
    lines = [
        "How many times as long torch.nn.LSTM takes as lstm_fast.LSTM: the geometric mean, and the least and the most "
        f"of a group's shapes, each the median of interleaved pairs. {_origin(runs[0])}.{_disturbed(runs)}",
        "",
        "| | " + " | ".join(heads) + " |",
        "| --- " * (1 + len(heads)) + "|",
    ]
    for group, cells in ratios.items():
        texts = [_summary(cells[column]) if column in cells else "–" for column in columns]
        lines.append(f"| {group} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def _count_disturbed(run: Run) -> int:
    return sum(row.get("disturbed", False) for row in run["rows"])  # older runs don't say


def _disturbed(runs: Sequence[Run]) -> str:
    """In how many rows others slowed the machine down all the while; nothing where in none."""
    counts = sorted((run["threads"], _count_disturbed(run)) for run in runs)
    found = [f"{count} on {_threads(threads)}" for threads, count in counts if count > 0]
    rows = sum(len(run["rows"]) for run in runs)
    return f" Of {rows} shapes and modes others disturbed all rounds of {', of '.join(found)}." if found else ""


def write_readme(readme: Path, runs: Sequence[Run]) -> None:
    """Puts ``readme_table`` between the markers of ``readme``, or leaves the file as it is.

    Raises:
        ReportError: the runs don't go together, or a marker is missing.
    """
    put_between(readme, MARKERS, readme_table(runs))


def put_between(readme: Path, markers: tuple[str, str], table: str) -> None:
    """``table`` in place of what lies between the markers, each a line of ``readme``; or the file stays as it is.

    Raises:
        ReportError: a marker is missing.
    """
    text = readme.read_bytes().decode()
    before, begin, rest = text.partition(markers[0])
    _, end, after = rest.partition(markers[1])
    if not begin or not end:
        raise ReportError(f"{readme} has no table to replace: a line {markers[0]} and, below it, a line {markers[1]}")
    files.replace(readme, f"{before}{begin}\n{table}{end}{after}".encode())


def plots(run: Run, folder: Path, name: str) -> list[Path]:
    """PNGs of the dense single layers, by mode and dtype: ratios to torch over B and H, and times over T and over B.
    Each file's name begins with ``name``."""
    plain: dict[tuple[str, str, int], Rows] = {}
    for row in run["rows"]:
        case = Case.of(row)
        if case == Case(case.T, case.B, case.H, case.I, dtype=case.dtype):
            plain.setdefault((row["mode"], case.dtype, case.I), {})[case.T, case.B, case.H] = row
    written = []
    for (mode, dtype, inputs), rows in plain.items():
        parts = [mode, dtype] + [f"I{inputs}"] * (inputs > 0)
        for kind, figure in (("ratio", _ratio_figure(rows)), ("time", _time_figure(rows))):
            if figure is not None:
                title = f"{', '.join(parts)}; {_machine(run)}, {_threads(run['threads'])}"
                figure.suptitle(fill(title, int(_LETTERS * figure.get_figwidth())))
                folder.mkdir(parents=True, exist_ok=True)
                written.append(folder / f"{'-'.join([name, kind, *parts])}.png")
                figure.savefig(written[-1], dpi=150)
    return written


def compare(old: Run, new: Run, threshold: float = 1.05) -> tuple[str, bool]:
    """What got slower from ``old`` to ``new``, in words, and whether anything did.

    A row is slower where it takes more than ``threshold`` times as long and its p20 lies above the old p80. Rows that
    others disturbed say nothing. What rivals took in the same rows tells how the machine changed.

    Raises:
        ReportError: the runs share no row, or none that others left alone.
    """
    rows, new_rows = ({(Case.of(row), row["mode"]): row for row in run["rows"]} for run in (old, new))
    before, after = ({key: row["ours"] for key, row in each.items()} for each in (rows, new_rows))
    disturbed = {(Case.of(row), row["mode"]) for run in (old, new) for row in run["rows"] if row.get("disturbed")}
    shared = before.keys() & after.keys()
    if not shared:
        raise ReportError("the two runs have no row in common: no case is measured in the same mode in both")
    times = {key: after[key]["ms"] / before[key]["ms"] for key in before if key in shared - disturbed}
    if not times:
        raise ReportError("the two runs have no row in common that others left alone: measure one of them anew")
    slower = [key for key in times if times[key] > threshold and after[key]["p20"] > before[key]["p80"]]
    machines = [f"{_machine(run)} with {_threads(run['threads'])}" for run in (old, new)]
    lines = [f"The machines differ: {machines[0]}, then {machines[1]}."] * (machines[0] != machines[1])
    for case, mode in sorted(slower, key=lambda key: -times[key]):
        was, now = (_number(each[case, mode]["ms"]) for each in (before, after))
        lines.append(f"slower: {times[case, mode]:.2f}×  {case.label()}, {mode}: {was} ms, then {now} ms")
    lines.append(f"{len(slower)} of {len(times)} rows slower; new time / old time: {_summary(times.values())}")
    for rival in sorted({name for key in times for name in rows[key]["rivals"]}):
        pairs = [[each[key]["rivals"].get(rival) for each in (rows, new_rows)] for key in times]
        if drift := [now["ms"] / was["ms"] for was, now in pairs if was and now]:
            lines.append(f"{rival} in the same rows, new time / old time: {_summary(drift)}")
    lines.append(f"rows only in the old run: {len(before) - len(shared)}; only in the new: {len(after) - len(shared)}")
    if len(times) < len(shared):
        lines.append(f"rows left out, as others disturbed them: {len(shared) - len(times)}")
    return "\n".join(lines), bool(slower)


def _machine_lines(run: Run) -> list[str]:
    """What the machine could do at most, and what starting takes, where the run says so."""
    lines = []
    if limits := run.get("limits"):
        rates = ", ".join(f"{name} {_number(rate)} GFLOP/s" for name, rate in limits["gflops"].items())
        traffic = ", ".join(f"{_number(rate)} GB/s to {size / 2**20:g} MiB" for size, rate in limits["bandwidth"])
        meeting = limits["exchange_us"]
        lines.append(f"limits: {rates}; {traffic}" + (f"; {meeting:.2f} µs to meet" if meeting else ""))
    if passes := [each["limits"]["gflops"] for each in run.get("passes", ())]:
        lines.append(
            "GFLOP/s before each pass: "
            + "; ".join(f"{name} {', '.join(_number(rates[name]) for rates in passes)}" for name in passes[0])
        )
    if left_out := run.get("rounds_left_out"):
        counted = sum(row["rounds"] for row in run["rows"])
        lines.append(f"{left_out} of {left_out + counted} rounds left out: the machine was slowed down")
    if disturbed := _count_disturbed(run):
        lines.append(f"in {disturbed} of {len(run['rows'])} rows others slowed the machine down all the while")
    if after := run.get("after"):
        texts = (f"{', '.join(each['clocks']) or 'not told'}, load {each['load']:.2f}" for each in (run, after))
        lines.append("clocks {}; after the last row {}".format(*texts))
    if startup := run.get("startup"):
        times = ("import_lstm_fast_ms", "import_torch_ms", "first_call_ms", "first_call_torch_ms")
        own, torch, first, torch_first = (_number(startup[name]) for name in times)
        lines.append(f"import {own} ms after torch's {torch}; first training pass {first} ms, torch's {torch_first}")
    return lines


def _flaws(run: Any) -> Iterator[str]:
    """Why ``run`` isn't a run; to be asked for the first flaw only, since each check relies on those before."""
    yield from _lacks("it", run, _RUN_KEYS)
    if run["device"] == "cuda":
        yield from _lacks("it", run, ("gpu", "capability"))
    yield from _odd("its", run, ("date", "commit", "cpu", "torch", "grid", "device"), "a text", _is_text)
    yield from _odd("its", run, ("threads",), "a number above 0", _is_positive)
    if limits := run.get("limits"):
        yield from _lacks("its 'limits'", limits, Limits._fields)
    yield from _lacks("its 'skipped'", run["skipped"], ())
    yield from (f"its {key!r} is not a list" for key in ("rows", "failed") if not isinstance(run[key], list))
    for number, row in enumerate(run["failed"], 1):
        yield from _lacks(f"its failed row {number}", row, (*_CASE_KEYS, "why"))
    for number, row in enumerate(run["rows"], 1):
        yield from _lacks(f"its row {number}", row, _ROW_KEYS)
        yield from _odd(f"its row {number}'s", row, ("T", "B", "H", "gflops"), "a number above 0", _is_positive)
        yield from _lacks(f"'ours' in its row {number}", row["ours"], _TIMES)
        yield from _odd(f"its row {number}'s", row["ours"], _TIMES, "a number above 0", _is_positive)
        yield from _lacks(f"'rivals' in its row {number}", row["rivals"], [row["best_rival"]] * bool(row["best_rival"]))
        for rival, times in row["rivals"].items():
            yield from _lacks(f"{rival!r} in its row {number}", times, _RATIOS)
            yield from _odd(f"its row {number}'s {rival!r}", times, _RATIOS, "a number above 0", _is_positive)


def _lacks(what: str, found: Any, keys: Iterable[str]) -> Iterator[str]:
    if not isinstance(found, dict):
        yield f"{what} is not a JSON object"
    yield from (f"{what} has no {key!r}" for key in keys if key not in found)


def _odd(whose: str, found: Row, keys: Iterable[str], what: str, holds: Callable[[Any], bool]) -> Iterator[str]:
    yield from (f"{whose} {key!r} should be {what}, got: {found[key]!r}" for key in keys if not holds(found[key]))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value < inf


def _machine(run: Run) -> str:
    """What the run measured."""
    return str(run["gpu"] if run["device"] == "cuda" else run["cpu"])


def _origin(run: Run) -> str:
    head, changed, _ = run["commit"].partition("+changes")
    return f"{_machine(run)}, torch {run['torch']}, commit {head[:9]}{changed}"


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"


def _summary(ratios: Iterable[float]) -> str:
    """Geometric mean, least and most."""
    found = list(ratios)
    return f"{geometric_mean(found):.2f}× ({min(found):.2f}..{max(found):.2f})"


def _number(value: float) -> str:
    return f"{value:.4g}" if value < 1e4 else f"{value:.0f}"


def _cells(row: Row) -> tuple[str, ...]:
    """The texts below ``_HEADS``."""
    rival = ("–",) * 4
    if row["best_rival"] is not None:
        best = row["rivals"][row["best_rival"]]
        interval = f"{best['ratio_low']:.2f}..{best['ratio_high']:.2f}"
        rival = (row["best_rival"], _number(best["ms"]), f"{row['ratio']:.2f}×", interval)
    rates = ("–" if row[rate] is None else _number(row[rate]) for rate in _RATES)
    share = "–" if row.get("share") is None else f"{100 * row['share']:.0f} % {row['limit']:8}"
    return Case.of(row).label(), row["mode"], _number(row["ours"]["ms"]), *rival, *rates, share


def _ratio_figure(rows: Rows) -> Figure | None:
    """Heat maps side by side, one for each T that was measured at two B and two H at least."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    maps: dict[int, dict[tuple[int, int], float]] = {}
    for (T, B, H), row in sorted(rows.items()):
        if "torch" in row["rivals"]:
            maps.setdefault(T, {})[B, H] = row["rivals"]["torch"]["ratio"]
    maps = {T: found for T, found in maps.items() if all(len(set(each)) > 1 for each in zip(*found, strict=True))}
    if not maps:
        return None
    top = max(1.1, *(max(ratio, 1 / ratio) for found in maps.values() for ratio in found.values()))
    figure = Figure(figsize=(1 + 4 * len(maps), 4), layout="constrained")
    panels = figure.subplots(1, len(maps), squeeze=False)[0]
    for axes, (T, found) in zip(panels, maps.items(), strict=True):
        ys, xs = (sorted(set(each)) for each in zip(*found, strict=True))
        values = [[found.get((y, x), nan) for x in xs] for y in ys]
        image = axes.imshow(values, cmap="RdBu", norm=LogNorm(1 / top, top), aspect="auto", origin="lower")
        for (y, x), ratio in found.items():
            color = "white" if abs(log(ratio)) > 0.6 * log(top) else "black"
            axes.text(xs.index(x), ys.index(y), f"{ratio:.2f}", ha="center", va="center", color=color)
        axes.set(title=f"T = {T}", xlabel="H", ylabel="B")
        axes.set_xticks(range(len(xs)), xs)
        axes.set_yticks(range(len(ys)), ys)
    bar = figure.colorbar(image, ax=list(panels), label="torch's time / ours", ticks=[1 / top, 1, top], format="%.2f")
    bar.minorticks_off()
    return figure


def _time_figure(rows: Rows) -> Figure | None:
    """Times over T at one B and over B at one T, a line for each H."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    found = [("T", "B", *_curves(rows, 0)), ("B", "T", *_curves(rows, 1))]
    found = [panel for panel in found if panel[-1]]
    if not found:
        return None
    hidden = sorted({each for *_, curves in found for each in curves})
    colors = {each: colormaps["viridis"](0.85 * i / max(1, len(hidden) - 1)) for i, each in enumerate(hidden)}
    figure = Figure(figsize=(2 + 4.5 * len(found), 4.5), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, (x, at, fixed, curves) in zip(panels, found, strict=True):
        axes.set(title=f"{at} = {fixed}", xlabel=x, ylabel="ms", xscale="log", yscale="log")
        for each, points in curves.items():
            xs, in_order = zip(*sorted(points.items()), strict=True)
            times = [(r["ours"]["ms"], r["rivals"].get("torch", {}).get("ms"), r.get("limit_ms")) for r in in_order]
            for style, line in zip(_STYLES, zip(*times, strict=True), strict=True):
                axes.plot(xs, [nan if ms is None else ms for ms in line], style, color=colors[each], marker=".")
        _shade(axes, curves)
    handles: list[Line2D | Patch] = [Line2D([], [], color=colors[each], label=f"H = {each}") for each in hidden]
    handles += [Line2D([], [], color="black", ls=style, label=label) for style, label in _STYLES.items()]
    handles += [Patch(color=color, label=f"limit: {regime}") for regime, color in _REGIMES.items()]
    figure.legend(handles=handles, loc="outside right center")
    return figure


def _curves(rows: Rows, axis: int) -> tuple[int, dict[int, dict[int, Row]]]:
    """The B that most rows share (``axis`` 0; 1: the T), the largest of such; and its rows by H and by T (B).

    An H with a single row isn't a line and isn't counted.
    """
    found: dict[int, dict[int, dict[int, Row]]] = {}
    for shape, row in rows.items():
        found.setdefault(shape[1 - axis], {}).setdefault(shape[2], {})[shape[axis]] = row
    curves = {at: {h: points for h, points in each.items() if len(points) > 1} for at, each in found.items()}
    fixed = max(curves, key=lambda at: (sum(map(len, curves[at].values())), at))
    return fixed, curves[fixed]


def _shade(axes: Axes, curves: dict[int, dict[int, Row]]) -> None:
    """A band around each x, in the colour of the limit that most of its rows have."""
    xs = sorted({x for points in curves.values() for x in points})
    edges = [xs[0] / _MARGIN, *(sqrt(a * b) for a, b in pairwise(xs)), xs[-1] * _MARGIN]
    for x, low, high in zip(xs, edges, edges[1:], strict=False):
        limits = Counter(points[x].get("limit") for points in curves.values() if x in points)
        regime = limits.most_common(1)[0][0]
        if regime is not None:
            axes.axvspan(low, high, color=_REGIMES[regime], linewidth=0, zorder=0)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_xticks(xs, [str(x) for x in xs])
    axes.minorticks_off()
