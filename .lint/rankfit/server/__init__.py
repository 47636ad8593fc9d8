"""The coordinator: Flower ServerApp, run loop, checkpoints, evaluation and reports."""
