"""Where Flower finds the ClientApp.

A simulation imports the ServerApp in one thread while another looks for the ClientApp. Python waits
for a package that another thread is importing only if that package is asked for itself, not on the
way to one of its subpackages; so a look for ``rankfit.client.app`` could see ``rankfit`` before it
has extended its path, and fail. This module lies in ``rankfit`` itself, beside that path.
"""

from rankfit.client.app import app

__all__ = ["app"]
