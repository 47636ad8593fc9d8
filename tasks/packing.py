"""Examples of a language model as rows of a batch: padded, or several packed into one row.

Packed examples are told apart by their positions, which start anew with each. Some models take that
for the boundary of attention, others let an example see its neighbours; :func:`check_packing` finds
out which by a forward pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rankfit.tasks.model_sources import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Label of a token that no loss is taken over.
IGNORED = -100
#: Tokens of the two examples of a probe.
_PROBE = (6, 5)
#: Differences of logits that are rounding, as shares of their spread, by bytes of a number.
_ROUNDING = {4: 1e-3, 2: 0.1}
#: The same tokens in other company, in the very same places: these may hardly differ.
_COMPANY = 1e-4


@dataclass(frozen=True)
class Encoded:
    """Tokens of one example; ``target`` marks those that the loss is taken over."""

    tokens: tuple[int, ...]
    target: tuple[bool, ...]


def padded(encoded: Sequence[Encoded], pad: int) -> dict[str, Tensor]:
    """One example a row, padded on the right, so that tokens keep their positions."""
    longest = max(len(one.tokens) for one in encoded)
    tokens = torch.full((len(encoded), longest), pad)
    labels = torch.full_like(tokens, IGNORED)
    mask = torch.zeros_like(tokens)
    for row, one in enumerate(encoded):
        count = len(one.tokens)
        tokens[row, :count] = torch.tensor(one.tokens)
        labels[row, :count] = _labels(one)
        mask[row, :count] = 1
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def packed(encoded: Sequence[Encoded], width: int, pad: int) -> dict[str, Tensor]:
    """Fill rows with whole examples, longest first, each into the first row that has room."""
    rows: list[list[Encoded]] = []
    room: list[int] = []
    for one in sorted(encoded, key=lambda one: -len(one.tokens)):
        count = len(one.tokens)
        place = next((i for i, left in enumerate(room) if left >= count), len(rows))
        if place == len(rows):
            rows.append([])
            room.append(width)
        rows[place].append(one)
        room[place] -= count
    longest = width - min(room)
    tokens = torch.full((len(rows), longest), pad)
    labels = torch.full_like(tokens, IGNORED)
    positions = torch.zeros_like(tokens)
    for row, members in enumerate(rows):
        start = 0
        for one in members:
            end = start + len(one.tokens)
            tokens[row, start:end] = torch.tensor(one.tokens)
            labels[row, start:end] = _labels(one)
            positions[row, start:end] = torch.arange(end - start)
            start = end
        positions[row, start:] = torch.arange(longest - start)  # padding: a member of its own
    return {"input_ids": tokens, "position_ids": positions, "labels": labels}


def _labels(one: Encoded) -> Tensor:
    """Target tokens; the first has nothing before it to be told from."""
    labels = torch.tensor(one.tokens)  # (n,)
    labels[~torch.tensor(one.target)] = IGNORED
    labels[0] = IGNORED
    return labels


@torch.no_grad()
def check_packing(model: "PreTrainedModel", width: int) -> None:
    """Refuse to pack for a model in which a packed example differs from the same one alone.

    Parameters
    ----------
    width : int
        Tokens of a row.

    Raises
    ------
    ModelError
        If it sees its neighbour, or the model takes no positions.
    """
    if width < sum(_PROBE):
        return  # so short a row holds one example
    drawn = torch.Generator().manual_seed(0)
    vocabulary = int(model.config.get_text_config().vocab_size)
    first, second, other = (
        tuple(torch.randint(vocabulary, (length,), generator=drawn).tolist())
        for length in (*_PROBE, _PROBE[0])
    )
    own = _logits(model, padded([_whole(second)], 0))[0]  # (n, vocabulary)
    spread = float(own.std())
    try:
        beside = _second(model, first, second)
        moved = float((beside - _second(model, other, second)).abs().max()) / spread
        apart = float((beside - own).abs().max()) / spread
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise _refusal(model, f"it cannot read packed rows: {error}") from error
    if not (moved <= _COMPANY and apart <= _ROUNDING[model.dtype.itemsize]):
        share = f"{100 * max(moved, apart):.2g} % of their spread"
        raise _refusal(model, f"an example's logits differ by {share} beside another one")


def _whole(tokens: tuple[int, ...]) -> Encoded:
    return Encoded(tokens, (True,) * len(tokens))


def _second(model: "PreTrainedModel", first: tuple[int, ...], second: tuple[int, ...]) -> Tensor:
    """Logits of the second of two packed examples."""
    row = packed([_whole(first), _whole(second)], len(first) + len(second), 0)
    return _logits(model, row)[0, len(first) :]


def _logits(model: "PreTrainedModel", batch: dict[str, Tensor]) -> Tensor:
    inputs = {name: one.to(model.device) for name, one in batch.items() if name != "labels"}
    logits: Tensor = model(**inputs).logits
    return logits.float()


def _refusal(model: "PreTrainedModel", why: str) -> ModelError:
    return ModelError(
        f"task.packing: {model.config.model_type} does not keep packed examples apart ({why}); set "
        "task.packing=false"
    )
