"""Where Flower finds the ServerApp; why here and not in its package: see ``client_app.py``."""

from rankfit.server.app import app

__all__ = ["app"]
