"""``lstm-fast bench``: its command line."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lstm_fast import cli, files, measured
from lstm_fast.bench import report, runner, training
from lstm_fast.bench.cases import GRIDS, MODES, Grid
from lstm_fast.bench.rivals import DEFAULT, RIVALS
from lstm_fast.dispatch import BACKENDS

GridName = Enum("GridName", {name: name for name in GRIDS}, type=str)  # type: ignore[misc]
TaskName = Enum("TaskName", {name: name for name in training.TASKS}, type=str)  # type: ignore[misc]

app = typer.Typer(help="Measure the LSTM against others, on this machine.", invoke_without_command=True)

_QUICK = GridName("quick")
Runs = Annotated[list[Path], typer.Argument(help="Files that `lstm-fast bench` wrote.")]


@app.callback()
def bench(
    context: typer.Context,
    grid: Annotated[GridName, typer.Option(help="What to measure.")] = _QUICK,
    modes: Annotated[str, typer.Option(help=f"Some of {', '.join(MODES)}.")] = "inference,forward+backward",
    rivals: Annotated[str, typer.Option(help=f"Some of {', '.join(RIVALS)}.")] = ",".join(DEFAULT),
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16 or float64, for all cases.")] = None,
    inputs: Annotated[
        int | None, typer.Option(help="Input features of all cases, else H; 1 leaves the recurrence alone.", min=1)
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads on a CPU; else torch's number.", min=1)] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda; else cuda where there is one.")] = "",
    backend: Annotated[str, typer.Option(help="Ours by name, else what it dispatches to.")] = "auto",
    seconds: Annotated[float, typer.Option(help="Of each case and mode.", min=0)] = 1.0,
    out: Annotated[Path | None, typer.Option(help="The JSON; else bench-<grid>.json.")] = None,
) -> None:
    """Measure a grid. Ctrl-C keeps what is done."""
    if context.invoked_subcommand is not None:
        command, given = context.invoked_subcommand, [name for name in context.params if cli.was_given(context, name)]
        if given:
            raise typer.BadParameter(f"options of {command} come behind it, got before it: --{', --'.join(given)}")
        return
    chosen_modes, chosen_rivals = _among(modes, MODES, "--modes"), _among(rivals, RIVALS, "--rivals")
    cases = GRIDS[grid.value]
    if dtype is not None:
        _one(dtype, runner.TOLERANCE, "--dtype")
        cases = {group: [case._replace(dtype=dtype) for case in each] for group, each in cases.items()}
    if inputs is not None:
        cases = {group: [case._replace(I=inputs) for case in each] for group, each in cases.items()}
    _one(backend, BACKENDS, "--backend")
    if threads is not None:
        torch.set_num_threads(threads)
    device = device or runner.usual_device()
    _one(device, ("cpu", "cuda"), "--device")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter(f"--device cuda needs an NVIDIA GPU, and torch {torch.__version__} finds none")
    output = out or Path(f"bench-{grid.value}.json")
    files.prepare(output)
    _run(grid.value, cases, chosen_modes, chosen_rivals, device, seconds, output, backend)
    record = report.load(output)
    print(report.table(record))
    print(f"\nwritten to {output}")
    if record["failed"] or not record["rows"]:
        raise typer.Exit(1)


def _run(
    name: str,
    grid: Grid,
    modes: list[str],
    rivals: list[str],
    device: str,
    seconds: float,
    output: Path,
    backend: str,
) -> None:
    """With a progress bar."""
    times = TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn()
    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *times) as bar:
        task = bar.add_task("limits of this machine", total=None)

        def progress(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=what)

        try:
            runner.run(name, grid, modes, rivals, device, seconds, output, progress, backend)
        except KeyboardInterrupt:
            bar.console.print(files.stopped(output), markup=False, soft_wrap=True)
            raise


def _one(name: str, known: Iterable[str], option: str) -> str:
    if name not in known:
        raise typer.BadParameter(f"{option} should be among {', '.join(known)}, got: {name}")
    return name


def _among(text: str, known: Iterable[str], option: str) -> list[str]:
    return [_one(name, known, option) for name in dict.fromkeys(name.strip() for name in text.split(","))]


@app.command("report")
def report_command(
    runs: Runs,
    plots: Annotated[Path | None, typer.Option(help="A folder for heat maps and curves.")] = None,
    readme: Annotated[Path | None, typer.Option(help="A README whose table between markers is written anew.")] = None,
) -> None:
    """Tables and plots of recorded runs."""
    names = [path.stem for path in runs]
    if plots is not None and len(set(names)) < len(names):
        raise typer.BadParameter(
            f"--plots names files by those of the runs, which should differ, got: {', '.join(names)}"
        )
    found, refused = [], []
    for path in runs:
        try:
            found.append(report.load(path))
            with report.understood(path):
                print(report.table(found[-1]))
                for plot in [] if plots is None else report.plots(found[-1], plots, path.stem):
                    print(plot)
        except (OSError, report.ReportError) as error:
            refused.append(error)
    if refused:  # the others' tables are told, and the first error is
        raise refused[0]
    if readme is not None:
        report.write_readme(readme, found)


@app.command()
def compare(
    old: Annotated[Path, typer.Argument(help="A recorded run.")],
    new: Annotated[Path, typer.Argument(help="A later one.")],
    threshold: Annotated[float, typer.Option(help="How many times as long counts as slower.", min=1)] = 1.05,
) -> None:
    """What got slower from one run to another; the exit code is 1 if something did."""
    found = report.load(old), report.load(new)
    with report.understood(old, new):
        text, slower = report.compare(*found, threshold)
    print(text)
    if slower:
        raise typer.Exit(1)


@app.command()
def tune(
    runs: Annotated[list[Path] | None, typer.Argument(help="Recorded runs; else this machine is measured.")] = None,
    out: Annotated[Path | None, typer.Option(help="The table; else the one that `auto` reads.")] = None,
) -> None:
    """Find where torch's own LSTM is faster, and have backend="auto" leave those calls to it."""
    path = out or measured.users_table()
    files.prepare(path)
    if not runs:
        device = runner.usual_device()
        runs = [Path("bench-tune.json")]
        files.prepare(runs[0])
        grid, kernel = {"cpu": ("tune", "cpu"), "cuda": ("tune-gpu", "persistent")}[device]
        _run(grid, GRIDS[grid], ["inference", "forward+backward"], ["torch"], device, 0.3, runs[0], kernel)
    found = [report.load(path) for path in runs]
    with report.understood(*runs):
        table = measured.table_from(found)
    if not table["rows"]:
        raise report.ReportError("a table needs quiet rows of ours against torch's, and the runs have none")
    files.write(path, table)
    faster = sum(row[-1] < measured.MARGIN for row in table["rows"])
    print(f"torch's own is faster in {faster} of {len(table['rows'])} measured calls; written to {path}")


@app.command("train")
def train_command(
    task: Annotated[TaskName | None, typer.Argument(help="Else all of them.")] = None,
    steps: Annotated[int, typer.Option(help="Of the optimiser, on each side.", min=2)] = 40,
    threads: Annotated[int | None, typer.Option(help="Threads; else torch's number.", min=1)] = None,
    out: Annotated[Path | None, typer.Option(help="A JSON of the results.")] = None,
) -> None:
    """Tokens a second of a model in training with either LSTM: same seed, same batches, same losses."""
    if threads is not None:
        torch.set_num_threads(threads)
    if out is not None:
        files.prepare(out)
    results = [training.run(name, steps) for name in ([task.value] if task else training.TASKS)]
    print(training.table(results))
    if out is not None:
        files.write(out, {**runner.describe(runner.usual_device()), "tasks": results})
    if not all(result["same_curve"] for result in results):
        raise typer.Exit(1)
