"""A federated method of your own in one file, compared with two of the catalogue.

    python examples/new_method.py run.rounds=10

A method is four choices: who trains which rank (allocation), which factors are trained in which
round (schedule), how updates are merged, and what each client starts from. This one trains both
factors for a while and then B alone: A has found its directions by then, and an average of B is
exact where all clients share A. Moved to the catalogue, the declaration below is all of it.
"""

import sys
from pathlib import Path

from rankfit.adapters.merge import PaddedChange
from rankfit.cli.compare import here
from rankfit.configs.compose import compose
from rankfit.strategies.allocation import OwnRank
from rankfit.strategies.methods import Method, WarmUp, methods, only_b

SETTLED_A = Method(
    name="settled-a",
    summary="Both factors for method.warm-up-rounds rounds, then B alone.",
    source="an example",
    allocate=OwnRank(),
    schedule=WarmUp(only_b),
    merge=PaddedChange,
)


def main(*overrides: str) -> dict[str, Path]:
    """Run the new method and two others on the quickstart; return their run directories."""
    methods()[SETTLED_A.name] = SETTLED_A
    found = {}
    for name in (SETTLED_A.name, "fedit", "rankfit"):
        parts = ("quickstart", "method.warm-up-rounds=5", *overrides)
        settings = compose([*parts, f"method.name={name}", f"run.name={name}"])
        here(settings)  # in this process: the real server and client, without Flower's transport
        found[name] = Path(settings.run.directory) / name
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
