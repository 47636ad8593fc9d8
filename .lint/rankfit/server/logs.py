"""RankFit's log lines on the stream that Flower forwards to the user."""

import logging

from rich.console import Console
from rich.logging import RichHandler

#: Columns of tables and log lines: Flower's log stream has no terminal to ask.
WIDTH = 118


def console() -> Console:
    """Return a console on standard output, which Flower forwards, of a fixed width."""
    return Console(width=WIDTH, highlight=False)


def show_logs() -> None:
    """Send the package's log to the console, once per process."""
    logger = logging.getLogger("rankfit")
    if not logger.handlers:
        handler = RichHandler(
            console=console(),
            show_path=False,
            omit_repeated_times=False,
            log_time_format="[%H:%M:%S]",
        )
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
