"""Traces of deep models of equal layers from two shallow ones, event by event.

The events of 3 layers are those of 2 with a block inserted wherever a layer does something
(loading, forward, backward, optimizer). Deeper models repeat these blocks. Which storage ends
follows from its place among the live storages of the same kind, counted from the newest or from the
oldest, whichever does not depend on the depth; likewise for the layer whose rank counts. Where this
has no single answer, or layers differ, the model is recorded at its full depth.
"""

import json
import logging
import re
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from rankfit.estimator.solve import StepFamily, solve
from rankfit.estimator.spec import StepSpec

log = logging.getLogger(__name__)

#: Depths that are recorded: a first and a last layer of their own kind need the second pair.
DEPTHS = (2, 3, 4)
#: Keys of configs that hold the number of layers.
_DEPTHS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "num_decoder_layers",
    "encoder_layers",
    "decoder_layers",
)
#: Events after an insertion that are compared.
_WINDOW = 48
_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")

Token = tuple[Hashable, ...]
#: Position among the events of the deeper recording, place of what is released from the newest and
#: from the oldest, layer, and bytes that each further layer adds.
Occurrence = tuple[int, int | None, int | None, int | None, int]


class _NotPeriodic(Exception):
    """The shallow traces do not tell what deeper ones look like."""


def solve_deep(spec: StepSpec, batches: tuple[int, int]) -> StepFamily:
    """As :func:`solve`, from two shallow recordings where all layers of the model are equal."""
    depth = depth_of(spec)
    if depth <= DEPTHS[-1]:
        return solve(spec, batches)
    recorded = solve(shallow(spec, DEPTHS[0]), batches)
    for layers in DEPTHS[1:]:
        deeper = solve(shallow(spec, layers), batches)
        try:
            return _Extrapolation(recorded, deeper, layers).to(spec, depth)
        except _NotPeriodic as reason:
            log.info("%d and %d layers do not tell %d: %s", layers - 1, layers, depth, reason)
            recorded = deeper
    return solve(spec, batches)


def depth_of(spec: StepSpec) -> int:
    """Number of equal layers; 0 where the config or the targets differ from layer to layer."""
    config = json.loads(spec.config)
    depths = {config[key] for key in _DEPTHS if isinstance(config.get(key), int)}
    if len(depths) != 1:
        return 0
    depth = int(depths.pop())
    for value in config.values():
        if _per_layer(value, depth) and any(a != b for a, b in pairwise(value)):
            return 0
    layers: dict[int, list[str]] = {}
    for target in spec.targets:
        layer, place = place_of(target)
        if layer is not None:
            layers.setdefault(layer, []).append(place)
    equal = set(layers) == set(range(depth)) and all(
        places == layers[0] for places in layers.values()
    )
    return depth if equal else 0


def shallow(spec: StepSpec, layers: int) -> StepSpec:
    """Build the same step with its first layers only."""
    config = json.loads(spec.config)
    depth = next(config[key] for key in _DEPTHS if isinstance(config.get(key), int))
    for key, value in config.items():
        if key in _DEPTHS and isinstance(value, int):
            config[key] = layers
        elif _per_layer(value, depth):
            config[key] = value[:layers]
    targets = tuple(t for t in spec.targets if (place_of(t)[0] or 0) < layers)
    heads = tuple(h for h in spec.heads if (place_of(h)[0] or 0) < layers)
    text = json.dumps(config, sort_keys=True)
    return replace(spec, config=text, targets=targets, heads=heads)


def place_of(target: str) -> tuple[int | None, str]:
    """Layer of a module (None = in no layer), and its name with the layer left open."""
    found = _LAYER.search(target)
    if found is None:
        return None, target
    return int(found[0]), f"{target[: found.start()]}#{target[found.end() :]}"


def _per_layer(value: object, depth: int) -> bool:
    return isinstance(value, list) and len(value) == depth and depth > 1


@dataclass(frozen=True)
class _Insertion:
    """Tokens ``three[start : start + length]`` come before ``two[at]``, once per further layer."""

    at: int
    start: int
    length: int


@dataclass(frozen=True)
class _Event:
    """One event of a recording, in terms that do not depend on the depth.

    ``index`` = its allocation; ``newest``, ``oldest`` = place of what it releases among the live
    allocations of its kind; ``layer`` = whose rank it counts.
    """

    kind: int
    begins: bool
    index: int
    newest: int
    oldest: int
    layer: int | None


class _Reading:
    """A shallow family read as tokens."""

    def __init__(self, family: StepFamily, kinds: dict[Token, int]) -> None:
        self.family = family
        self.places = [place_of(target) for target in family.spec.targets]
        trained, state = set(family.trained.tolist()), set(family.state.tolist())
        began: dict[int, int] = {}
        live: dict[int, list[int]] = {}
        self.events: list[_Event] = []
        for event, phase in zip(family.events.tolist(), family.phases, strict=True):
            index = event if event >= 0 else -1 - event
            layer, variable = self._variable(int(family.column[index]))
            if event >= 0:
                # The norms of all gradients lie in one tensor, which grows with the depth.
                grows = phase == "optimizer" and variable == 0
                token = (
                    family.operators[index], phase, variable,
                    0 if grows else int(family.amount[index]),
                    bool(family.sampled[index]), index in trained, index in state,
                )  # fmt: skip
                began[index] = kinds.setdefault(token, len(kinds))
                newest = oldest = 0
                live.setdefault(began[index], []).append(index)
            else:
                alike = live[began[index]]
                oldest = alike.index(index)
                newest = len(alike) - 1 - oldest
                del alike[oldest]
            self.events.append(_Event(began[index], event >= 0, index, newest, oldest, layer))
        phases = {phase: number for number, phase in enumerate(dict.fromkeys(family.phases))}
        self.codes = np.array(
            [
                (event.kind * 2 + event.begins) * 8 + phases[phase]
                for event, phase in zip(self.events, family.phases, strict=True)
            ],
            dtype=np.int64,
        )

    def _variable(self, column: int) -> tuple[int | None, Hashable]:
        count = len(self.places)
        if not 1 <= column <= 2 * count:
            return None, column if column == 0 else column - 2 * count
        layer, place = self.places[(column - 1) % count]
        return layer, (place, column > count)


class _Extrapolation:
    """Families of ``layers`` − 1 and of ``layers`` layers, aligned."""

    def __init__(self, two: StepFamily, three: StepFamily, layers: int) -> None:
        self.layers = layers
        kinds: dict[Token, int] = {}
        self.two, self.three = _Reading(two, kinds), _Reading(three, kinds)
        self.insertions = list(_insertions(self.two.codes, self.three.codes))

    def to(self, spec: StepSpec, depth: int) -> StepFamily:
        """Family of the same step at a depth."""
        places = {place_of(target): i for i, target in enumerate(spec.targets)}
        family = self.three.family
        shallow_count, count = len(self.three.places), len(spec.targets)
        source: list[int] = []  # allocation of the deeper family that each one is a copy of
        amount: list[int] = []
        column: list[int] = []
        events: list[int] = []
        phases = []
        live: dict[int, list[int]] = {}
        for position, newest, oldest, layer, growth in self._walk(depth):
            event = self.three.events[position]
            phases.append(family.phases[position])
            alike = live.setdefault(event.kind, [])
            if not event.begins:
                place = len(alike) - 1 - newest if newest is not None else oldest
                if place is None or not 0 <= place < len(alike):
                    raise _NotPeriodic("a release has no storage to go with")
                events.append(-1 - alike.pop(place))
                continue
            own = int(family.column[event.index])
            if 1 <= own <= 2 * shallow_count:
                tail = own > shallow_count
                _, name = self.three.places[(own - 1) % shallow_count]
                own = 1 + places[layer, name] + (count if tail else 0)
            elif own:
                own += 2 * (count - shallow_count)
            events.append(len(source))
            alike.append(len(source))
            source.append(event.index)
            amount.append(int(family.amount[event.index]) + (depth - self.layers) * growth)
            column.append(own)
        origin = np.array(source)
        return StepFamily(
            spec=spec,
            operators=[family.operators[index] for index in source],
            column=np.array(column, dtype=np.int64),
            amount=np.array(amount, dtype=np.int64),
            sampled=family.sampled[origin],
            events=np.array(events, dtype=np.int64),
            phases=phases,
            trained=np.flatnonzero(np.isin(origin, family.trained)),
            state=np.flatnonzero(np.isin(origin, family.state)),
        )

    def _walk(self, depth: int) -> Iterator[Occurrence]:
        """Events of the model at a depth, in order."""
        at = shift = 0
        ends = [*self.insertions, _Insertion(len(self.two.events), len(self.three.events), 0)]
        for insertion in ends:
            for position in range(at, insertion.at):
                yield self._common(position, position + shift, depth)
            for copy in range(depth - self.layers + 1):
                for offset in range(insertion.length):
                    yield self._repeated(insertion, offset, copy, depth)
            at, shift = insertion.at, shift + insertion.length

    def _common(self, two: int, three: int, depth: int) -> Occurrence:
        """Event that occurs once, whatever the depth."""
        a, b = self.two.events[two], self.three.events[three]
        newest, oldest = _invariant(a, b)
        layer = b.layer
        if a.layer is not None and b.layer is not None and a.layer != b.layer:
            if b.layer != a.layer + 1:
                raise _NotPeriodic("the layer of an event jumps")
            layer = b.layer + depth - self.layers  # counted from the last layer
        growth = 0
        if a.begins:
            growth = int(self.three.family.amount[b.index] - self.two.family.amount[a.index])
        return three, newest, oldest, layer, growth

    def _repeated(self, insertion: _Insertion, offset: int, copy: int, depth: int) -> Occurrence:
        """Event that occurs once for every further layer."""
        position = insertion.start + offset
        before, event = self.three.events[position - insertion.length], self.three.events[position]
        newest, oldest = _invariant(before, event)
        layer = event.layer
        if layer is not None and before.layer is not None:
            step = layer - before.layer
            if step == 1:
                layer += copy
            elif step == -1:
                layer += depth - self.layers - copy
            else:
                raise _NotPeriodic("the layers of a block are in no order")
        if event.begins:
            amounts = self.three.family.amount
            if amounts[event.index] != amounts[before.index]:
                raise _NotPeriodic("a block of events takes other bytes in each layer")
        return position, newest, oldest, layer, 0


def _invariant(a: _Event, b: _Event) -> tuple[int | None, int | None]:
    """Place of what is released, from the newest or the oldest, whichever is the same in both."""
    if a.begins:
        return None, None
    if a.newest == b.newest:
        return b.newest, None
    if a.oldest == b.oldest:
        return None, b.oldest
    raise _NotPeriodic("releases are in no order")


def _insertions(two: NDArray[np.int64], three: NDArray[np.int64]) -> Iterator[_Insertion]:
    """Align two sequences of tokens: the second is the first with blocks inserted.

    A block is put as late as it can be, and equals the tokens before it: it is a repetition.
    """
    at = start = 0
    while at < len(two) or start < len(three):
        same = min(len(two) - at, len(three) - start)
        differs = np.flatnonzero(two[at : at + same] != three[start : start + same])
        step = int(differs[0]) if len(differs) else same
        at, start = at + step, start + step
        if at == len(two) and start == len(three):
            return
        length = _length(two[at : at + _WINDOW], three, start)
        yield _Insertion(at, start, length)
        start += length


def _length(following: NDArray[np.int64], three: NDArray[np.int64], start: int) -> int:
    """Length of the block inserted at ``start``, after which most of ``following`` comes."""
    longest, matched = 0, 0
    if len(following):
        candidates = np.flatnonzero(three[start + 1 :] == following[0]) + 1
    else:
        candidates = np.array([len(three) - start])
    for length in candidates[candidates <= start].tolist():
        after = three[start + length : start + length + len(following)]
        # The last token of a block is compared first: it is the one just before.
        if three[start + length - 1] != three[start - 1] or not np.array_equal(
            three[start : start + length], three[start - length : start]
        ):
            continue
        differs = np.flatnonzero(after != following[: len(after)])
        match = int(differs[0]) if len(differs) else len(after)
        if match > matched or not longest:
            longest, matched = length, match
    if not longest:
        raise _NotPeriodic("no block of events repeats")
    return longest
