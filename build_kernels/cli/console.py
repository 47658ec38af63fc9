"""Print results on stdout and messages on stderr."""

from __future__ import annotations

import signal
import sys

from rich.console import Console
from rich.table import Table

_UNBOUND = 10_000  # columns: a table takes all that it needs

talk = Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """Print one message on stderr, its brackets as they are."""
    talk.print(text, markup=False, soft_wrap=True)


def stop_like_interrupt() -> None:
    """Make SIGTERM, and SIGHUP of a closed terminal, end the command as Ctrl-C does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
        signal.signal(signal.SIGHUP, signal.default_int_handler)


def results(*, width: int) -> Console:
    """Return a console on stdout: as wide as the terminal, else `width` columns."""
    return Console(width=None if sys.stdout.isatty() else width, highlight=False)


def fits(console: Console, table: Table) -> bool:
    """Return whether the table fits the console without a folded or cut cell."""
    unbound = console.options.update(width=_UNBOUND)
    return console.measure(table, options=unbound).maximum <= console.width
