"""The ``lstm-fast`` command. ``info`` needs torch alone; the rest is in ``lstm_fast.translate.commands``."""

from __future__ import annotations

import io
import signal
import sys
from typing import TYPE_CHECKING

import lstm_fast
from lstm_fast.environment import environment

if TYPE_CHECKING:
    import typer

MISSING = "This command needs"
_EXTRA = ("matplotlib", "rich", "sacrebleu", "safetensors", "sentencepiece", "typer")


def main() -> None:
    """Runs the command line and exits: 0 if all went well, 2 with a sentence on bad input, 130 on Ctrl-C or SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # batch systems and containers end a run so
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # where its encoding lacks a letter
    try:
        if sys.argv[1:] == ["info"]:
            print(info())
            return
        from lstm_fast.translate.commands import run
    except ModuleNotFoundError as error:
        missing = str(error.name).partition(".")[0]
        if missing not in _EXTRA:
            raise
        print(f"{MISSING} {missing}: pip install '.[translate]' in the source of lstm_fast", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(run())


def info() -> str:
    """Versions, processor and every LSTM backend, with the reason for each that can't run here."""
    lines = [f"{name:<10} {value}" for name, value in environment().items()]
    for name, status in lstm_fast.backends().items():
        lines.append(f"{name:<10} {'runs here' if status.available else 'cannot run here'}: {status.detail}")
    return "\n".join(lines)


def was_given(context: typer.Context, name: str | None) -> bool:
    """Whether a parameter stands on the command line."""
    source = context.get_parameter_source(name or "")
    return source is not None and source.name == "COMMANDLINE"


if __name__ == "__main__":
    main()
