"""Checks of what a client returns, before the merge sees it. Free of Flower."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rankfit.adapters.held import Prints
from rankfit.adapters.merge import Update
from rankfit.adapters.state import Adapter
from rankfit.adapters.wire import WireType, decode_update
from rankfit.estimator.plan import Plan

Metrics = Mapping[str, int | float]


class BadUpdate(ValueError):
    """An update that must not be merged; the message says what is wrong with it."""


@dataclass(frozen=True)
class Assignment:
    """What one client was asked to do in a round.

    Attributes
    ----------
    client : str
        Name of the client.
    node_id : int
        Flower node that it answers from.
    plan : Plan
        What it should do.
    given : Adapter
        The trainable part that it starts from, as it arrives (after the wire type's rounding).
    download_bytes : int
        Bytes of adapter sent to it.
    indices : Mapping[str, Tensor]
        By module, which directions of the global adapter it was given (absent = the leading ones).
    prints : Prints
        Hashes of what it holds once it has answered.
    """

    client: str
    node_id: int
    plan: Plan
    given: Adapter
    download_bytes: int
    indices: Mapping[str, Tensor] = field(default_factory=dict)
    prints: Prints = field(default_factory=dict)


def read_update(
    assignment: Assignment,
    arrays: Mapping[str, NDArray[np.generic]],
    metrics: Metrics,
    max_norm: float,
    wire_type: WireType = "float32",
) -> Update:
    """Turn a reply into an update that fits its assignment.

    A client that ran out of memory may have lowered its rank; it says so in ``rank-cap``, and its
    factors are then those of the first ``rank-cap`` directions.

    Raises
    ------
    BadUpdate
        For missing or foreign names, wrong shapes, values that are not finite, a number of samples
        below one, or a change longer than ``max_norm`` (0 = no limit).
    """
    samples = metrics.get("num-examples", 0)
    if not samples > 0:
        raise BadUpdate(f"num-examples is {samples}; expected at least 1")
    given = _given(assignment, metrics)
    expected = given.moving(assignment.plan.moves)
    try:
        state = decode_update(arrays, expected, wire_type)
    except ValueError as error:
        raise BadUpdate(str(error)) from error
    _check_names(state, expected)
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise BadUpdate(
                f"{name} has shape {tuple(tensor.shape)}; the plan asks for "
                f"{tuple(expected[name].shape)}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise BadUpdate(f"{name} holds values that are not finite")
    if max_norm > 0:
        norm = sum(float((state[n] - expected[n]).double().square().sum()) for n in state) ** 0.5
        if norm > max_norm:
            raise BadUpdate(
                f"change of norm {norm:.3g} is above server.max-update-norm {max_norm:g}"
            )
    trained = Adapter.from_state_dict(given.state_dict() | state, given.scale)
    indices = {
        m: assignment.indices[m][:r] for m, r in given.ranks.items() if m in assignment.indices
    }
    return Update(given, trained, float(samples), indices)


def _given(assignment: Assignment, metrics: Metrics) -> Adapter:
    """The start that the reply's shapes refer to, with the rank that the client fell back to."""
    if "rank-cap" not in metrics:
        return assignment.given
    cap = int(metrics["rank-cap"])
    if cap < 1:
        raise BadUpdate(f"rank-cap is {cap}; expected at least 1")
    ranks = {module: min(rank, cap) for module, rank in assignment.given.ranks.items()}
    return assignment.given.cut(ranks)


def _check_names(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    missing, foreign = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
    if missing or foreign:
        parts = []
        if missing:
            parts.append(f"lacks {missing[0]} ({len(missing)} missing)")
        if foreign:
            parts.append(f"holds unasked {foreign[0]} ({len(foreign)} foreign)")
        raise BadUpdate("update " + " and ".join(parts))
