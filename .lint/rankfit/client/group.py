"""Training one client in several processes: batches are shared out, gradients are added up.

Each process has the whole model, and all take the same steps. Gradients are summed here and not by
``DistributedDataParallel``: every loss is divided by the whole batch's count before the sum, so a
step is that of one process but for rounding, also where the last batch is smaller than the group;
and no second copy of the gradients is held.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed, nn

from rankfit.tasks.adapted import training_device


class OtherFailed(RuntimeError):
    """Another process of the group failed; its own log line says how."""


class Group:
    """The processes that train one client, as one of them sees them.

    A process that fails says so at the next meeting of all (:meth:`agree`), where every process
    then raises: none is left waiting for another. Alone, all of this does nothing.

    Parameters
    ----------
    size, rank : int
        Number of processes and the position of this one; process 0 answers the server.
    device : torch.device
        Where this process trains.
    """

    def __init__(self, size: int, rank: int, device: torch.device) -> None:
        self.size, self.rank, self.device = size, rank, device
        self._meets = False

    @classmethod
    def alone(cls) -> "Group":
        """One process, on the first visible GPU or on the CPU."""
        return cls(1, 0, training_device())

    @classmethod
    def joined(cls, *, cpu: bool) -> "Group":
        """Join the group that the environment names; waits for the others."""
        from accelerate import PartialState

        # A process that dies ends the group (crew.py): no wait of a living one is too long.
        state = PartialState(cpu=cpu, timeout=timedelta(days=1))
        return cls(state.num_processes, state.process_index, state.device)

    @property
    def leads(self) -> bool:
        """Whether this process answers for all."""
        return self.rank == 0

    def share(self, batch: Sequence[int]) -> list[int]:
        """Part of a batch for this process; the parts differ by one sample at most."""
        return list(batch[self.rank :: self.size])

    @contextmanager
    def meeting(self) -> Iterator[None]:
        """All processes do this together: what fails here in one fails in all."""
        self._meets = self.size > 1
        try:
            yield
        except OtherFailed:
            raise
        except Exception as error:
            self.fail(error)
            raise
        finally:
            self._meets = False

    def part(self) -> None:
        """The processes do not meet again in this training."""
        self._meets = False

    def fail(self, error: Exception) -> None:
        """Tell the others at their next meeting that this process has failed."""
        if self._meets and not getattr(error, "told", False):
            memory = isinstance(error, torch.OutOfMemoryError)
            self._sum([float(memory), float(not memory)])
            error.told = True  # type: ignore[attr-defined]

    def agree(self, *values: float) -> list[float]:
        """Sum of each value over the group.

        Raises
        ------
        torch.OutOfMemoryError
            If a process has run out of memory.
        OtherFailed
            If one has failed otherwise.
        """
        if self.size == 1:
            return list(values)
        memory, other, *sums = self._sum([0.0, 0.0, *values])
        if other:
            self._meets = False
            raise OtherFailed("another process of this client failed; the worker's log says how")
        if memory:
            error = torch.OutOfMemoryError("another process of this client ran out of memory")
            error.told = True  # type: ignore[attr-defined]
            raise error
        return sums

    def largest(self, value: int) -> int:
        """Largest value of the group; right after :meth:`agree`."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.int64, device=self.device)
        distributed.all_reduce(tensor, op=distributed.ReduceOp.MAX)
        return int(tensor)

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients over the group in place; right after :meth:`agree`."""
        if self.size == 1:
            return
        waiting = []
        for parameter in parameters:
            if parameter.grad is None:  # no sample of the batch was this process's
                parameter.grad = torch.zeros_like(parameter)
            waiting.append(distributed.all_reduce(parameter.grad, async_op=True))
        for work in waiting:
            work.wait()

    def _sum(self, values: list[float]) -> list[float]:
        """Sums over the group; always of eight numbers: who fails meets who does not."""
        tensor = torch.zeros(8, dtype=torch.float64, device=self.device)
        tensor[: len(values)] = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(tensor)
        return [float(value) for value in tensor.tolist()[: len(values)]]
