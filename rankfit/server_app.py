"""The Flower ServerApp: reads the run config and hands over to the run loop.

It lies in ``rankfit`` itself for the reason that ``client_app.py`` gives.
"""

import logging

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.superlink.grid.http_grid import HttpGrid

from rankfit.configs.settings import ConfigError, from_flat
from rankfit.server.loop import federate
from rankfit.server.reporting import show_logs
from rankfit.tasks.model_sources import ModelError
from rankfit.tasks.records import DataError

app = ServerApp()

log = logging.getLogger(__name__)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that the run config describes."""
    show_logs()
    try:
        settings = from_flat(context.run_config)
        if isinstance(grid, HttpGrid):  # of a SuperLink with SuperNodes; a simulation has its own
            if ignored := settings.simulated_keys():
                log.warning("not used, they count in a simulation alone: %s", ", ".join(ignored))
            settings = settings.deployed()
        federate(grid, settings)
    except (ConfigError, DataError, ModelError) as error:
        log.error("the run cannot start: %s", error)
        raise error.with_traceback(None) from None  # Flower prints it, and the line above says all
