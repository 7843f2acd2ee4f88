"""Where ``lstm-fast`` starts: outside the package, whose import takes torch's seconds, for Ctrl-C to end these too."""

import sys


def main() -> None:
    """See ``lstm_fast.cli.main``."""
    try:
        from lstm_fast import cli
    except KeyboardInterrupt:
        sys.exit(130)
    cli.main()
