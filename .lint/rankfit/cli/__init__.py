"""The ``rankfit`` command and the Python entry point behind it."""
