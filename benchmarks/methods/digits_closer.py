"""The methods at the top of the digits comparison, with eight seeds and a finer choice of rates.

``python -m benchmarks.methods.digits_closer --out FOLDER`` shares the runs of
:mod:`benchmarks.methods.digits` in the same folder, and writes
``benchmarks/results/methods-digits-closer.json``: with three seeds the standard deviations are
themselves uncertain by half, too much to tell neighbours apart.
"""

from dataclasses import replace

from benchmarks.methods import grid
from benchmarks.methods.digits import (
    EIGHT_SEEDS,
    FINE_RATES,
    NEEDS,
    digits_grid,
    write_pictures,
)

METHODS = (
    "fedex-lora", "fedit", "ffa-lora", "flora", "hetlora", "hralora", NEEDS["lokr"], "rankfit",
)  # fmt: skip
#: The same with the moments that ``rankfit`` has for its head.
WHOLE_HEADS = tuple(f"{m}+train.head-moment=tensor" for m in METHODS if m != "rankfit")


def main() -> None:
    """Carry out the comparison."""
    asked = grid.arguments(str(__doc__))
    data = asked.out.resolve() / "data"
    if not asked.table:
        write_pictures(data)
    whole = digits_grid(data)
    columns = tuple(s for s in whole.settings if "/dirichlet" in s.name)
    closer = replace(
        whole, name="digits-closer", methods=METHODS, settings=columns, rates=FINE_RATES,
        seeds=EIGHT_SEEDS, more={s.name: WHOLE_HEADS for s in columns},
    )  # fmt: skip
    grid.carry_out(closer, asked)


if __name__ == "__main__":
    main()
