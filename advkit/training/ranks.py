"""Several processes that train one model (`torchrun`): who they are, and all that they say to each other.

Every process has the whole model and its share of each batch. The loss as a whole is one module for torch's
DistributedDataParallel, so that its gradient is averaged over the processes in the one backward pass of a step; what a
loss does inside (attacks, several calls of the network) stays each process's own. A loss that couples the rows of a
batch asks for all of them with `gathered`, and for a mean over all of them with `mean_of_batch`.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from advkit.core.errors import AdvkitError, BadModel, EndedElsewhere, LostProcess, UsageError
from advkit.core.text import first_line

T = TypeVar("T")

TIMEOUT = timedelta(minutes=10)
"""How long a process waits for one that does not answer; one that was ended is noticed at once."""
_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_TROUBLE = ("gloo/", "nccl", "connection closed", "connection reset", "broken pipe", "timed out")


class Ranks:
    """This process among those that train together; alone, everything here is the identity.

    rank:  which one it is, from 0; the first writes files and speaks
    world: how many there are
    """

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world
        self._sizes: tuple[int, ...] = (1,) * world  # rows of every process in the piece of a batch at hand

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Rows cut into one share per process; lengths differ by one at most."""
        return torch.tensor_split(rows, self.world)

    def pieces(self, batch: Tensor, number: int) -> list[tuple[Tensor, tuple[int, ...]]]:
        """This process's rows of a batch in so many pieces, each with how many rows every process has in it.

        Row i of the batch belongs to process i modulo their number, so that a place in the batch is always the same
        process's, and the same place of its share, however long the batch is.
        """
        shares = [torch.tensor_split(batch[rank :: self.world], number) for rank in range(self.world)]
        return [(shares[self.rank][n], tuple(len(share[n]) for share in shares)) for n in range(number)]

    @contextmanager
    def working_on(self, sizes: tuple[int, ...]) -> Iterator[None]:
        """A loss is taken inside: `gathered` and `mean_of_batch` know these processes and their numbers of rows."""
        self._sizes = sizes
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    def weight(self, rows: int, batch: int) -> float:
        """What the mean loss of `rows` of a batch's rows is multiplied with, so that the mean over the processes of the
        gradients is that of the whole batch's mean loss."""
        return rows * self.world / batch

    def wrapped(self, loss: nn.Module) -> nn.Module:
        """The loss with its gradients averaged over the processes; their weights become those of the first."""
        if self.world == 1:
            return loss
        # a loss may leave out weights in one step and use them in another: they are found in its graph
        return DistributedDataParallel(loss, find_unused_parameters=True)

    def silent(self, loss: nn.Module) -> AbstractContextManager[Any]:
        """Gradients stay this process's own inside, to be averaged with those of a later backward pass."""
        return loss.no_sync() if isinstance(loss, DistributedDataParallel) else nullcontext()

    def mean(self, means: Sequence[Tensor]) -> list[Tensor]:
        """Means over the rows of the whole batch, from means over this process's rows; constant."""
        if self.world == 1:
            return list(means)
        shared = [each.detach() * (self._sizes[self.rank] / sum(self._sizes)) for each in means]
        for group in _by_kind(shared):
            flat = torch.cat([each.reshape(-1) for each in group])
            dist.all_reduce(flat)
            for each, total in zip(group, torch.split(flat, [each.numel() for each in group]), strict=True):
                each.copy_(total.view_as(each))
        return shared

    def gathered(self, rows: Tensor) -> Tensor:
        """The rows [B, ...] of the whole batch in its order, from this process's [b, ...].

        The gradient flows to this process's rows alone, b / B times too small a share of the batch: it is scaled by
        B / b, as `weight` will undo.
        """
        if self.world == 1:
            return rows
        most, own = max(self._sizes), self._sizes[self.rank]
        sent = rows.detach().to(torch.uint8) if rows.dtype == torch.bool else rows.detach()
        padded = torch.cat((sent, sent.new_zeros(most - own, *sent.shape[1:]))) if most > own else sent.contiguous()
        received = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(received, padded)
        if rows.requires_grad:
            live = torch.cat((rows, rows.new_zeros(most - own, *rows.shape[1:]))) if most > own else rows
            received[self.rank] = padded + sum(self._sizes) / own * (live - live.detach())
        # the first processes have a row more where there are rows over
        return torch.stack(received, 1).flatten(0, 1)[: sum(self._sizes)].to(rows.dtype)

    def share_buffers(self, buffers: Iterable[Tensor]) -> None:
        """Running statistics and counters become those of the first process."""
        if self.world == 1:
            return
        with torch.no_grad():
            for group in _by_kind(list(buffers)):
                flat = torch.cat([each.reshape(-1) for each in group])
                dist.broadcast(flat, 0)
                for each, value in zip(group, torch.split(flat, [each.numel() for each in group]), strict=True):
                    each.copy_(value.view_as(each))

    def everyone(self, mine: T) -> list[T]:
        """What every process has, in order, at every process; tensors in it lie on the CPU."""
        if self.world == 1:
            return [mine]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, mine)
        return found

    def to_first(self, mine: T) -> list[T]:
        """What every process has, in order, at the first; at the others a list of their own alone."""
        found: list[Any] | None = [None] * self.world if self.first else None
        if self.world > 1:
            dist.gather_object(mine, found)
        return [mine] if self.world == 1 or found is None else found

    def from_first(self, mine: T) -> T:
        """What the first process has, at every process."""
        if self.world == 1:
            return mine
        held: list[Any] = [mine if self.first else None]
        dist.broadcast_object_list(held, 0)
        value: T = held[0]
        return value

    def earliest(self, step: int | None) -> int | None:
        """The smallest of all processes' steps; None where none has one."""
        if self.world == 1:
            return step
        found = torch.tensor(torch.iinfo(torch.long).max if step is None else step)
        dist.all_reduce(found, dist.ReduceOp.MIN)
        return None if int(found) == torch.iinfo(torch.long).max else int(found)

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """What all processes do alike: where one of them fails, all end.

        The first that failed raises its own error, the others EndedElsewhere.
        """
        failure: AdvkitError | None = None
        try:
            yield
        except AdvkitError as error:
            if self.world == 1 or isinstance(error, LostProcess):
                raise
            failure = error
        if self.world == 1:
            return
        told = self.everyone(None if failure is None else str(failure))
        failed = next((rank for rank, words in enumerate(told) if words is not None), None)
        if failed is None:
            return
        if failed == self.rank and failure is not None:
            raise failure
        raise EndedElsewhere(f"process {failed} of {self.world} ended the training: {told[failed]}") from failure

    @contextmanager
    def listening(self, kept: Callable[[], str] = str) -> Iterator[None]:
        """Inside, a process that is gone is LostProcess, and processes but the first log errors alone.

        kept: says what stays of the work, for the message
        """
        logger = logging.getLogger("advkit")
        logger.addFilter(self._speaks)
        try:
            yield
        except RuntimeError as error:
            if self.world == 1 or not _is_trouble(error):
                raise
            stays = kept() or "no epoch was stored yet"
            raise LostProcess(
                f"process {self.rank} of {self.world}: another process of this training has ended or does not answer "
                f"({_plainly(error)}); {stays}: start all of them again with the same command"
            ) from error
        finally:
            logger.removeFilter(self._speaks)

    def _speaks(self, record: logging.LogRecord) -> bool:
        return self.first or record.levelno >= logging.ERROR


ALONE = Ranks()
_current: ContextVar[Ranks] = ContextVar("the processes whose loss is being taken", default=ALONE)


def gathered(rows: Tensor) -> Tensor:
    """In a training loss: the rows [B, ...] of the whole batch, from this process's; on one process, the same tensor.

    For losses that couple the rows of a batch. The loss made of them has its value for the whole batch on every
    process, and the gradients of all processes add up to its gradient.
    """
    return _current.get().gathered(rows)


def mean_of_batch(means: Sequence[Tensor]) -> list[Tensor]:
    """In a training loss: means over the whole batch, from means over this process's rows; constant."""
    return _current.get().mean(means)


def launched() -> bool:
    """Whether a launcher such as torchrun started this process as one of several."""
    return all(name in os.environ for name in _LAUNCHED) and os.environ["WORLD_SIZE"] != "1"


connected = False
"""Whether this process was connected to others.

Where gradients were averaged, threads of gloo outlive the connection. One that is not done with its last message when
the interpreter goes ends the process by a signal (SIGABRT; torch 2.14), whatever its exit code.
"""


@contextmanager
def joined() -> Iterator[Ranks]:
    """The processes that torchrun started, connected; this one alone where there are no others.

    A process group that is up already is used and left up.
    """
    if dist.is_available() and dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size())
        return
    if not launched():
        yield Ranks()
        return
    if not dist.is_available():
        raise UsageError("this build of torch has no torch.distributed: train in one process")
    accelerated = torch.cuda.is_available() and dist.is_nccl_available()
    global connected
    connected = True
    dist.init_process_group("cpu:gloo,cuda:nccl" if accelerated else "gloo", timeout=TIMEOUT)
    ranks = Ranks(dist.get_rank(), dist.get_world_size())
    try:
        with ranks.listening(), _told_to_end():
            yield ranks
    except LostProcess:
        raise  # to close the connections would mean to wait for it
    except AdvkitError:
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


class _Told(RuntimeError):
    """The launcher ends this process."""


@contextmanager
def _told_to_end() -> Iterator[None]:
    """The launcher's signal to end, which it sends where another process has ended, is an error inside."""

    def end(number: int, frame: Any) -> None:
        raise _Told("the launcher says so")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def place(device: str, ranks: Ranks) -> str:
    """The device of this process: of several CUDA devices the one of its number on the machine.

    Raises UsageError where one device is named for several processes, or there are fewer devices than processes.
    """
    kind, _, index = device.partition(":")
    if ranks.world == 1 or kind == "cpu":
        return device
    if kind != "cuda":
        raise UsageError(f"device {device} with {ranks.world} processes: expected cpu or cuda, say --device cpu")
    if index:
        raise UsageError(f"device {device} with {ranks.world} processes: say cuda, and each one takes its own")
    local = int(os.environ.get("LOCAL_RANK", ranks.rank))
    if local >= torch.cuda.device_count():
        raise UsageError(
            f"process {local + 1} on this machine, which has {torch.cuda.device_count()} CUDA devices: start at most "
            "one per device, or say --device cpu"
        )
    torch.cuda.set_device(local)
    return f"cuda:{local}"


def check_rows(rows: int, batch_size: int, ranks: Ranks, statistics: bool) -> None:
    """Raise where a process would get no row of a batch, or a single one for statistics of the batch."""
    least = least_rows(ranks, statistics)
    if min(rows, batch_size) >= least:
        return
    if ranks.world == 1:
        raise BadModel(
            f"a batch of a single row (batch_size={batch_size}, {rows} training rows) and a model "
            "with batch normalisation, which has no statistics of one row: choose a batch_size of at least 2"
        )
    each = "two rows each, which batch normalisation needs" if statistics else "a row each"
    raise UsageError(
        f"batch_size={batch_size} and {rows} training rows do not give {ranks.world} processes {each}: choose a "
        f"batch_size of at least {least}, or fewer processes"
    )


def least_rows(ranks: Ranks, statistics: bool) -> int:
    """The smallest batch that gives every process what it needs."""
    return ranks.world * (2 if statistics else 1)


def _by_kind(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for each in tensors:
        groups.setdefault((each.dtype, each.device), []).append(each)
    return list(groups.values())


def _plainly(error: RuntimeError) -> str:
    """What an error of communication says, without the place in a library's source and its guesses."""
    return re.sub(r"^\[\S*\] ", "", first_line(error)).partition(". ")[0]


def _is_trouble(error: RuntimeError) -> bool:
    """Whether an error is one of communication."""
    if isinstance(error, (dist.DistError, _Told)):
        return True
    return any(sign in str(error).lower() for sign in _TROUBLE)
