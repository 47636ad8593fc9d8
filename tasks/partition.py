"""How one training set is dealt to the clients of a run, drawn once from its seed."""

import warnings
from collections.abc import Sequence

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from rankfit.configs.settings import RunSettings, derive
from rankfit.tasks.data import DataError, Examples

Indices = NDArray[np.int64]

#: Draws before a partition that leaves some client short is given up.
_DRAWS = 20


class PartitionError(DataError):
    """A data set that cannot be dealt as the settings ask."""

    code = "data-partition"


def partition(
    labels: NDArray[np.int64],
    settings: RunSettings,
    clients: int,
    groups: NDArray[np.str_] | None = None,
) -> list[Indices]:
    """Deal the examples to clients: disjoint parts that cover the set, sorted.

    ``local`` deals nothing: the one part is the node's whole set.

    Parameters
    ----------
    labels
        Class of every training example, shape (n,).
    settings
        ``partition`` says how, ``run.seed`` draws.
    clients
        Number of parts.
    groups
        Value of ``partition.column`` of every training example, shape (n,).

    Raises
    ------
    PartitionError
        If a part cannot have ``partition.min-samples`` examples.
    """
    kind, minimum = settings.partition.kind, max(1, settings.partition.min_samples)
    if kind == "local":
        _refuse_few(len(labels), minimum, 1)
        return [np.arange(len(labels))]
    _refuse_few(len(labels), minimum, clients)
    seed = derive(settings.run.seed, "partition")
    if kind == "iid":
        parts = _iid(labels, clients, seed)
    elif kind == "dirichlet":
        parts = _dirichlet(labels, clients, settings.partition.alpha, minimum, seed)
    elif kind == "natural":
        parts = _natural(labels, groups, clients, minimum, seed)
    elif kind == "quantity":
        parts = _quantity(len(labels), clients, settings.partition.alpha, minimum, seed)
    else:
        parts = _pathological(labels, clients, settings.partition.classes_per_client, minimum, seed)
    return [np.sort(part) for part in parts]


def partition_of(examples: Examples, settings: RunSettings, clients: int) -> list[Indices]:
    """Deal a training set; see :func:`partition`."""
    return partition(examples.labels, settings, clients, examples.groups)


def alike(
    labels: NDArray[np.int64], parts: Sequence[Indices], test_labels: NDArray[np.int64]
) -> list[Indices]:
    """Deal a test set so that each client's part has the classes of its training part.

    Each class is cut in proportion to the training examples that the clients hold of it; every
    test example of a class that somebody holds goes to one client.
    """
    held: list[list[Indices]] = [[] for _ in parts]
    for label in np.unique(test_labels):
        counts = np.array([int((labels[part] == label).sum()) for part in parts])
        if not counts.sum():
            continue
        rows = np.flatnonzero(test_labels == label)
        ends = np.rint(np.cumsum(counts)[:-1] / counts.sum() * len(rows)).astype(np.int64)
        for client, own in enumerate(np.split(rows, ends)):
            held[client].append(own)
    return [np.sort(np.concatenate(own)) if own else np.arange(0) for own in held]


def _refuse_few(examples: int, minimum: int, clients: int) -> None:
    if examples < minimum * clients:
        raise PartitionError(
            f"{examples} examples cannot give each of {clients} clients at least {minimum}: lower "
            "partition.min-samples or simulation.clients"
        )


def _iid(labels: NDArray[np.int64], clients: int, seed: int) -> list[Indices]:
    """Shuffle and cut into equal parts (the partitioner itself cuts without shuffling)."""
    # Imported late: flwr-datasets imports seaborn, for half a second that a refused run needs not.
    from flwr_datasets.partitioner import IidPartitioner

    order = np.random.default_rng(seed).permutation(len(labels))
    partitioner = IidPartitioner(clients)
    partitioner.dataset = Dataset.from_dict({"row": order})
    return [_rows(partitioner.load_partition(client)) for client in range(clients)]


def _dirichlet(
    labels: NDArray[np.int64], clients: int, alpha: float, minimum: int, seed: int
) -> list[Indices]:
    """Split each class over all clients by Dirichlet(alpha) (Hsu et al. 2019, Li et al. 2022)."""
    from flwr_datasets.partitioner import DirichletPartitioner

    table = Dataset.from_dict({"label": labels, "row": np.arange(len(labels))})
    for draw in range(_DRAWS):
        partitioner = DirichletPartitioner(
            num_partitions=clients,
            partition_by="label",
            alpha=float(alpha),
            min_partition_size=minimum,
            shuffle=False,
            seed=derive(seed, draw),
        )
        partitioner.dataset = table
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one for each draw that leaves a client short
            try:
                return [_rows(partitioner.load_partition(client)) for client in range(clients)]
            except ValueError:
                continue
    raise PartitionError(
        f"Dirichlet({alpha}) left some of {clients} clients with fewer than {minimum} of "
        f"{len(labels)} examples in every draw: raise partition.alpha, or lower "
        "partition.min-samples or simulation.clients"
    )


def _natural(
    labels: NDArray[np.int64],
    groups: NDArray[np.str_] | None,
    clients: int,
    minimum: int,
    seed: int,
) -> list[Indices]:
    """Give every value of a column to one client whole; with more values than clients, several.

    The values are dealt largest first, each to the client with the fewest examples so far; the
    seed says which client is which.
    """
    if groups is None:
        raise PartitionError("partition.kind natural: the data has no partition.column")
    values, counts = np.unique(groups, return_counts=True)
    if len(values) < clients:
        raise PartitionError(
            f"partition.column holds {len(values)} values, which {clients} clients cannot share: "
            f"set simulation.clients to at most {len(values)}"
        )
    names = np.random.default_rng(seed).permutation(clients)
    held: list[list[Indices]] = [[] for _ in range(clients)]
    sizes = np.zeros(clients, dtype=np.int64)
    for place in np.argsort(-counts, kind="stable"):
        client = names[int(np.argmin(sizes[names]))]
        held[client].append(np.flatnonzero(groups == values[place]))
        sizes[client] += counts[place]
    if sizes.min() < minimum:
        raise PartitionError(
            f"natural: the smallest of {clients} clients has {sizes.min()} of {len(labels)} "
            "examples: lower partition.min-samples or simulation.clients"
        )
    return [np.concatenate(parts) for parts in held]


def _quantity(examples: int, clients: int, alpha: float, minimum: int, seed: int) -> list[Indices]:
    """Sizes by Dirichlet(alpha) above the minimum, classes alike (Li et al. 2022)."""
    generator = np.random.default_rng(seed)
    shares = generator.dirichlet(np.full(clients, float(alpha)))
    free = examples - minimum * clients
    ends = np.rint(np.cumsum(shares)[:-1] * free).astype(np.int64)
    ends += minimum * np.arange(1, clients)
    return list(np.split(generator.permutation(examples), ends))


def _rows(part: Dataset) -> Indices:
    return np.asarray(part.with_format("numpy")["row"][:], dtype=np.int64)


def _pathological(
    labels: NDArray[np.int64], clients: int, classes_per_client: int, minimum: int, seed: int
) -> list[Indices]:
    """Give each client exactly N classes, each class split over its holders by Dirichlet(1).

    The setting of HRALoRA (CCGrid 2026). flwr-datasets' PathologicalPartitioner splits a class
    into equal parts and can leave classes out. Here every class is held, by as many clients as any
    other or one fewer, and a holder has at least one example of it.
    """
    classes = np.unique(labels)
    holders = _holders(len(classes), clients, classes_per_client, seed)
    rows = [np.flatnonzero(labels == label) for label in classes]
    for label, members, held in zip(classes, rows, holders, strict=True):
        if len(members) < len(held):
            raise PartitionError(
                f"class {label} has {len(members)} examples for {len(held)} clients that hold it: "
                "lower partition.classes-per-client or simulation.clients"
            )
    for draw in range(50 * _DRAWS):
        generator = np.random.default_rng([seed, draw])
        parts: list[list[Indices]] = [[] for _ in range(clients)]
        for members, held in zip(rows, holders, strict=True):
            shares = generator.dirichlet(np.ones(len(held)))
            # One each, the rest by the shares.
            cuts = np.cumsum(shares)[:-1] * (len(members) - len(held))
            ends = cuts.astype(np.int64) + np.arange(1, len(held))
            for client, piece in zip(
                held, np.split(generator.permutation(members), ends), strict=True
            ):
                parts[client].append(piece)
        dealt = [np.concatenate(pieces) for pieces in parts]
        if min(len(part) for part in dealt) >= minimum:
            return dealt
    raise PartitionError(
        f"pathological: some of {clients} clients with {classes_per_client} of {len(classes)} "
        f"classes had fewer than {minimum} of {len(labels)} examples in every draw: raise "
        "partition.classes-per-client, or lower partition.min-samples or simulation.clients"
    )


def _holders(classes: int, clients: int, each: int, seed: int) -> list[Sequence[int]]:
    """Draw which clients hold each class: ``each`` classes a client, classes held evenly."""
    if each > classes:
        raise PartitionError(
            f"partition.classes-per-client {each}: the data has only {classes} classes"
        )
    if clients * each < classes:
        raise PartitionError(
            f"{clients} clients of {each} classes leave some of {classes} classes to nobody: raise "
            "partition.classes-per-client or simulation.clients, or lower data.classes"
        )
    generator = np.random.default_rng(derive(seed, "classes"))
    held: list[list[int]] = [[] for _ in range(classes)]
    for client in range(clients):
        order = generator.permutation(classes)
        for chosen in sorted(order, key=lambda label: len(held[label]))[:each]:
            held[chosen].append(client)
    return [tuple(members) for members in held]
