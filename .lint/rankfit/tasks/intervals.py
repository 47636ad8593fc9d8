"""Confidence intervals of accuracies, 95 %."""

from collections.abc import Sequence

_Z = 1.959963984540054  # 97.5 % quantile of the normal distribution


def wilson(right: int, total: int) -> tuple[float, float]:
    """Wilson's interval of a share (Wilson 1927); it stays inside [0, 1], also at 0 and 1.

    Raises
    ------
    ValueError
        If ``total`` is 0, or ``right`` is not between 0 and it.
    """
    if total < 1 or not 0 <= right <= total:
        raise ValueError(f"{right} right of {total}; expected 0 to {total}, of at least 1")
    share = right / total
    scale = 1 + _Z**2 / total
    middle = (share + _Z**2 / (2 * total)) / scale
    half = _Z / scale * (share * (1 - share) / total + _Z**2 / (4 * total**2)) ** 0.5
    # At 0 and 1 the ends are exact; rounding must not leave them a hair outside.
    return (max(0.0, middle - half) if right else 0.0), (
        min(1.0, middle + half) if right < total else 1.0
    )


def of_mean(parts: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """Interval of the mean of independent shares, each (right, total).

    The halves of the parts' Wilson intervals are joined as independent errors (MOVER, Zou and
    Donner 2008), so that one part gives Wilson's own interval.

    Raises
    ------
    ValueError
        If there is no part, or one is no share.
    """
    if not parts:
        raise ValueError("no parts; expected at least one (right, total)")
    shares = [right / total for right, total in parts]
    ends = [wilson(right, total) for right, total in parts]
    mean = sum(shares) / len(parts)
    low = sum((s - end[0]) ** 2 for s, end in zip(shares, ends, strict=True)) ** 0.5
    high = sum((end[1] - s) ** 2 for s, end in zip(shares, ends, strict=True)) ** 0.5
    return max(0.0, mean - low / len(parts)), min(1.0, mean + high / len(parts))
