"""How training shows on a terminal, and in a log."""

from __future__ import annotations

from types import TracebackType

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class ProgressBar:
    """A ``Reporter``: a bar beneath the notes on a terminal, the notes alone elsewhere."""

    def __init__(self) -> None:
        self._progress = Progress(
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[rate]}"),
            transient=True,
        )
        self._progress.disable = not self._progress.console.is_terminal
        self._task = self._progress.add_task("", total=1.0, rate="")

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def note(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def step(self, progress: float, loss: float, sentences_per_second: float) -> None:
        rate = f"loss {loss:.2f}  {sentences_per_second:.0f} sentences/s"
        self._progress.update(self._task, completed=min(progress, 1.0), rate=rate)
