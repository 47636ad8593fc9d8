"""The Flower ServerApp: reads the run config and hands over to the run loop."""

import logging

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from rankfit.configs.settings import from_flat
from rankfit.server.logs import show_logs
from rankfit.server.loop import federate

app = ServerApp()

log = logging.getLogger(__name__)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that the run config describes."""
    show_logs()
    federate(grid, from_flat(context.run_config))
