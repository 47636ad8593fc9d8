"""All clients of a round trained at once: the same figures as one after the other, sooner.

A comparison of many methods trains thousands of tiny clients, and most of the time of a tiny client
goes into putting an adapter into a model, not into arithmetic. Here one frozen base holds the
adapters of all clients of the round, every client has rows of its own in one batch, and a layer is
one batched product. The server's side (plans, messages, starts, merges, checkpoints) is the real
one; ``tests/benchmarks`` checks that the updates are those of :mod:`rankfit.client.trainer`.

What it cannot do it refuses: other than classifiers whose head is one linear layer, whole epochs
(clients would take different numbers of steps), dropout, personal heads, scores on the clients.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from rankfit.adapters import names
from rankfit.adapters.adapter import Adapter
from rankfit.adapters.wire import decode, encode_update
from rankfit.client.app import app as client_app
from rankfit.client.regularizers import (
    Penalty,
    Proximal,
    RankDecay,
    add_all,
    cut_state,
    pruned_rank,
)
from rankfit.client.trainer import kept_moments, recall
from rankfit.client.workspace import Workspace
from rankfit.configs import protocol
from rankfit.configs.settings import ConfigError, RunSettings, derive, learning_rate, to_flat
from rankfit.estimator.plan import Plan
from rankfit.server.in_process import InProcessGrid
from rankfit.server.loop import federate
from rankfit.strategies import messages
from rankfit.tasks.base_model import target_modules
from rankfit.tasks.lora import chunks
from rankfit.tasks.optimizers import build_optimizer


def run(settings: RunSettings) -> None:
    """Carry out one run; a runner for :func:`rankfit.cli.compare.run_all`."""
    federate(SideBySideGrid(settings), settings)


@dataclass
class Member:
    """One client of a round.

    Attributes
    ----------
    given, remainder : Adapter
        What it trains, and what it is given frozen (None = nothing).
    parameters : dict[str, nn.Parameter]
        Its own tensors under PEFT's names, at their true shapes; those that do not move need no
        gradient.
    batches : list of NDArray
        Training samples of each step.
    """

    message: Message
    client: str
    plan: Plan
    given: Adapter
    remainder: Adapter | None
    parameters: dict[str, nn.Parameter]
    samples: int
    batches: list[NDArray[np.int64]]

    def moving(self) -> dict[str, nn.Parameter]:
        """The tensors that are trained."""
        return {name: p for name, p in self.parameters.items() if p.requires_grad}


class Stacked(nn.Module):
    """A frozen linear layer with one adapter per client; rows of client i are the i-th part."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        #: (clients, r, k) and (clients, d, r), scale included.
        self.a: Tensor | None = None
        self.b: Tensor | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        """W·x + s·B·A·x; inputs (clients · m, …, k)."""
        result: Tensor = self.base(inputs)
        if self.a is None or self.b is None:
            return result
        own = inputs.reshape(len(self.a), -1, inputs.shape[-1])  # (clients, m · tokens, k)
        added = own @ self.a.transpose(1, 2) @ self.b.transpose(1, 2)
        return result + added.reshape(result.shape)


class StackedHead(nn.Module):
    """One whole linear layer per client."""

    #: (clients, d, k) and (clients, 1, d), or None.
    weight: Tensor
    bias: Tensor | None

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs (clients · m, …, k)."""
        own = inputs.reshape(len(self.weight), -1, inputs.shape[-1])
        result = own @ self.weight.transpose(1, 2)
        if self.bias is not None:
            result = result + self.bias
        return result.reshape(*inputs.shape[:-1], -1)


class SideBySideGrid(InProcessGrid):
    """A grid whose clients train together when the first reply of a round is asked for."""

    def __init__(self, settings: RunSettings) -> None:
        count = settings.simulation.clients
        nodes = [{"partition-id": i, "num-partitions": count} for i in range(count)]
        super().__init__(client_app, to_flat(settings), nodes)  # type: ignore[arg-type]
        self._trainer = SideBySide(settings)
        self._ready: dict[str, Message] = {}

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """See the base class."""
        ids = list(message_ids)
        training = [i for i in ids if i in self._waiting and _trains(self._waiting[i])]
        if training:
            members = [self._waiting.pop(i) for i in training]
            places = [message.metadata.dst_node_id - 1000 for message in members]
            replies = self._trainer(members, places)
            self._ready |= dict(zip(training, replies, strict=True))
        for message_id in ids:
            if message_id in self._ready:
                return [self._ready.pop(message_id)]
        return super().pull_messages(ids)


def _trains(message: Message) -> bool:
    return message.metadata.message_type == protocol.TRAIN


class SideBySide:
    """Trains the clients of one round at once.

    Raises
    ------
    ConfigError
        For settings that it cannot follow; see the module.
    """

    def __init__(self, settings: RunSettings) -> None:
        train = settings.train
        refused = {
            "task.kind": settings.task.kind == "causal-lm",
            "task.problem": settings.task.problem != "classification",
            "train.steps": train.steps == 0,
            "train.label-prior": train.label_prior > 0,
            "train.max-grad-norm": train.max_grad_norm > 0,
            "train.autocast": train.autocast != "none",
            "train.optimizer": train.optimizer != "adamw",
            "lora.dropout": settings.lora.dropout > 0,
            "head.mode": settings.head.mode == "local",
            "method.scores": settings.method.scores == "clients",
        }
        odd = [key for key, bad in refused.items() if bad]
        if odd:
            raise ConfigError(f"clients cannot be trained side by side with {', '.join(odd)}")
        self._settings = settings
        self._space = Workspace(settings, None)
        base = self._space.base
        base.requires_grad_(False)
        self._layers = {}
        for name in target_modules(base, settings.lora.targets):
            self._layers[name] = Stacked(cast(nn.Linear, base.get_submodule(name)))
            base.set_submodule(name, self._layers[name])
        self._heads = {name: StackedHead() for name in self._space.heads}
        for name, head in self._heads.items():
            if not isinstance(base.get_submodule(name), nn.Linear):
                raise ConfigError(f"the head {name!r} is no linear layer")
            base.set_submodule(name, head)

    def __call__(self, incoming: Sequence[Message], places: Sequence[int]) -> list[Message]:
        """Train, and reply to each message in turn."""
        members = [self._member(*pair) for pair in zip(incoming, places, strict=True)]
        penalties = [self._penalties(member) for member in members]
        plan = cast(ConfigRecord, incoming[0].content["plan"])
        number = cast(int, plan["round"])
        rate = learning_rate(self._settings, number)
        decay = self._settings.train.weight_decay
        every = [pair for member in members for pair in member.moving().items()]
        groups = members[0].plan.rates.groups(every, rate)
        optimizer = build_optimizer("adamw-fused", groups, rate=rate, decay=decay)
        stores = [self._space.moment_store(place, str(plan["run"])) for place in places]
        kept = [(store and store.load(number)) or {} for store in stores]
        for member, known in zip(members, kept, strict=True):
            recall(optimizer, member.moving(), known)
        self._space.base.train()
        losses = torch.zeros(len(members))
        for rows in zip(*(member.batches for member in members), strict=True):
            loss = self._loss(members, rows)  # (clients,)
            loss.sum().backward()
            for terms in penalties:
                add_all(terms)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses += loss.detach()
        for member, store, known in zip(members, stores, kept, strict=True):
            if store:
                store.save(number, {**known, **kept_moments(optimizer, member.moving())})
        return [
            self._reply(member, terms, number, rate, float(loss))
            for member, terms, loss in zip(members, penalties, losses, strict=True)
        ]

    def _member(self, message: Message, place: int) -> Member:
        config = cast(ConfigRecord, message.content["plan"])
        plan, client = Plan.from_dict(dict(config)), str(config["client"])
        arrays = messages.record_arrays(message.content.array_records["adapter"])
        whole = Adapter.from_state_dict(decode(arrays), cast(float, config["scale"]))
        given = whole.cut(plan.ranks)
        moving = given.moving(plan.trainable)
        parameters = {
            name: nn.Parameter(tensor.clone(), requires_grad=name in moving)
            for name, tensor in given.state_dict().items()
        }
        own = self._space.samples(place, self._settings.simulation.clients)
        return Member(
            message, client, plan, given, whole.rest(plan.ranks) if plan.remainder_rank else None,
            parameters, len(own), list(self._batches(own, client, cast(int, config["round"]))),
        )  # fmt: skip

    def _batches(
        self, samples: NDArray[np.int64], client: str, number: int
    ) -> Iterator[NDArray[np.int64]]:
        """As many batches as steps, in the order of :mod:`rankfit.client.trainer`."""
        train = self._settings.train
        draw = np.random.default_rng(derive(self._settings.run.seed, "order", number, client))
        left = train.steps
        while left:
            for batch in chunks(draw.permutation(samples).tolist(), train.batch_size):
                if left:
                    yield np.array(batch)
                    left -= 1

    def _penalties(self, member: Member) -> list[Penalty]:
        found: list[Penalty] = []
        if mu := self._settings.train.proximal:
            found.append(Proximal(member.moving(), member.given.state_dict(), mu))
        if "prune" in member.plan.extras and member.plan.rank > 1:
            method = self._settings.method
            keep = pruned_rank(member.plan.rank, method.prune_decay)
            found.append(RankDecay(member.moving(), keep, method.prune_weight))
        return found

    def _loss(self, members: Sequence[Member], rows: Sequence[NDArray[np.int64]]) -> Tensor:
        """Mean loss of each client over its own batch; shorter ones are filled and not counted."""
        self._place(members)
        longest = max(map(len, rows))
        filled = [np.concatenate([own, np.repeat(own[:1], longest - len(own))]) for own in rows]
        inputs = self._space.task.train.collate(np.concatenate(filled).tolist())
        labels = inputs.pop("labels")
        logits = self._space.base(**inputs).logits  # (clients · longest, classes)
        losses = cross_entropy(logits, labels, reduction="none").reshape(len(rows), longest)
        counts = torch.tensor([len(own) for own in rows])
        counted = torch.arange(longest) < counts[:, None]
        return (losses * counted).sum(1) / counts

    def _place(self, members: Sequence[Member]) -> None:
        """Put the clients' tensors into the layers, filled with zeros up to the largest rank."""
        for module, layer in self._layers.items():
            sides = [self._sides(member, module) for member in members]
            largest = max((a.shape[0] for a, _ in sides), default=0)
            layer.a = torch.stack([pad(a, (0, 0, 0, largest - len(a))) for a, _ in sides])
            layer.b = torch.stack([pad(b, (0, largest - b.shape[1])) for _, b in sides])
        for name, head in self._heads.items():
            weight, bias = (names.head_name(f"{name}.{part}") for part in ("weight", "bias"))
            head.weight = torch.stack([member.parameters[weight] for member in members])
            head.bias = None
            if bias in members[0].parameters:
                biases = torch.stack([member.parameters[bias] for member in members])
                head.bias = biases.unsqueeze(1)

    def _sides(self, member: Member, module: str) -> tuple[Tensor, Tensor]:
        """A (r, k) and scaled B (d, r) of one client, its frozen directions behind its own."""
        base = self._layers[module].base
        a, b = (
            base.weight.new_zeros(0, base.in_features),
            base.weight.new_zeros(base.out_features, 0),
        )
        if module in member.given.factors:
            scale = member.given.scale
            a = torch.cat([a, member.parameters[names.a_name(module)]])
            b = torch.cat([b, scale * member.parameters[names.b_name(module)]], 1)
        if member.remainder is not None and module in member.remainder.factors:
            rest = member.remainder.factors[module]
            a, b = torch.cat([a, rest.a]), torch.cat([b, member.remainder.scale * rest.b], 1)
        return a, b

    def _reply(
        self, member: Member, terms: Sequence[Penalty], number: int, rate: float, loss: float
    ) -> Message:
        settings = self._settings
        metrics: dict[str, int | float] = {
            "num-examples": member.samples, "train-loss": loss / settings.train.steps,
            "steps": settings.train.steps, "learning-rate": rate,
        }  # fmt: skip
        state: Mapping[str, Tensor] = {n: p.detach() for n, p in member.moving().items()}
        for term in terms:
            if isinstance(term, RankDecay) and term.prunes():
                metrics |= {"pruned": 1, "rank-cap": term.keep}
                state = cut_state(state, term.keep)
        rounding = torch.Generator().manual_seed(
            derive(settings.run.seed, "wire", number, member.client)
        )
        arrays = encode_update(state, member.given.state_dict(), settings.wire.dtype, rounding)
        record = messages.arrays_record(arrays)
        origin = messages.origin(member.message)
        content = RecordDict(
            {"adapter": record, "metrics": MetricRecord(metrics), protocol.ORIGIN: origin}
        )
        return Message(content, reply_to=member.message)
