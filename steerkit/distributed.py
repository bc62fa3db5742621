"""Several processes at one job, as `torchrun` and `accelerate launch` start them.

    with distributed.launched():                          # joins the processes, if there are several
        mine = batch[distributed.share(len(batch))]       # each rank its part
        distributed.average(parameter.grad)               # what all ranks found
        distributed.first(lambda: run.finish(summary))    # done once, while the others wait

Without other processes each function does nothing, at no cost. Ranks share their fate: when one stops with an error, the others
stop with the same, and what is on disk is whole, because rank 0 alone writes.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from steerkit.errors import InputError, SteerkitError

TIMEOUT = timedelta(minutes=10)
"""For how long ranks wait for one that still lives but does not answer."""

T = TypeVar("T")
_launches = itertools.count()


class _Fate:
    """What the ranks tell each other of one job goes under keys of its own, so that a job that failed leaves the next one alone."""

    jobs = 0
    depth = 0
    turns = 0

    @classmethod
    def key(cls, name: str) -> str:
        return f"steerkit/{cls.jobs}/{name}"

    @classmethod
    def next_turn(cls) -> str:
        cls.turns += 1
        return cls.key(f"turn-{cls.turns}")


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if _joined() else 0


def world_size() -> int:
    """The number of processes at this job."""
    return dist.get_world_size() if _joined() else 1


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return rank() == 0


def share(n: int) -> slice:
    """This rank's part of n things. Raises InputError when they do not divide evenly."""
    size, left = divmod(n, world_size())
    if left:
        raise InputError(
            f"A batch of {n} does not divide among {world_size()} processes: choose a batch_size that does."
        )
    return slice(rank() * size, (rank() + 1) * size)


# -- what all ranks call together ------------------------------------------------------------------------------------


def add_up(tensor: Tensor) -> Tensor:
    """The sum over the ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def average(*tensors: Tensor) -> None:
    """The means over the ranks, in place."""
    if world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor.div_(world_size())


def mean(tensor: Tensor) -> Tensor:
    """The mean over the ranks."""
    if world_size() > 1:
        tensor = tensor.clone()
        average(tensor)
    return tensor


def smallest(tensor: Tensor) -> Tensor:
    """The smallest of the ranks' values."""
    if world_size() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor, dist.ReduceOp.MIN)
    return tensor


def gather(tensor: Tensor) -> Tensor:
    """The ranks' tensors, end to end along the first axis; the other axes must agree."""
    if world_size() == 1:
        return tensor
    lengths = [torch.zeros((), dtype=torch.int64, device=tensor.device) for _ in range(world_size())]
    dist.all_gather(lengths, torch.tensor(len(tensor), device=tensor.device))
    longest = max(int(length) for length in lengths)
    padded = torch.cat([tensor, tensor.new_zeros((longest - len(tensor), *tensor.shape[1:]))])
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(length)] for part, length in zip(parts, lengths)])


def same_as_first(tensors: Iterable[Tensor]) -> None:
    """Copy rank 0's values into the others' tensors."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def any_of(asked: bool, device: torch.device) -> bool:
    """Whether it is so on any rank."""
    if world_size() == 1:
        return asked
    return bool(add_up(torch.tensor(float(asked), device=device)))


def first(work: Callable[[], T]) -> T | None:
    """Do `work` on rank 0, which gets what it gives, the others None. They go on when it is done, however long that takes, or stop
    with rank 0's error."""
    if world_size() == 1:
        return work()
    key = _Fate.next_turn()
    if is_first():
        found = work()
        _store().set(key, "done")
        return found
    while not _store().check([key]):
        if _failed():
            raise _told_error(_told())
        time.sleep(0.02)
    return None


# -- beginning and end -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def launched() -> Iterator[None]:
    """Join the processes that a launcher has started with this one, if it did; an error of one becomes every rank's.

    A process group that is there already is used as it is.
    """
    if _joined() or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        with _one_fate():
            yield
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    store, own, ranks = _rendezvous()
    own_keys = dist.PrefixStore(
        f"steerkit/launch-{next(_launches)}", store
    )  # addresses of an earlier group are no use
    dist.init_process_group(backend, store=own_keys, rank=own, world_size=ranks, timeout=TIMEOUT)
    with _one_fate():
        yield
        _meet()
    dist.destroy_process_group()


@functools.cache
def _rendezvous() -> tuple[Any, int, int]:
    """(store, rank, number of ranks) of what the launcher started, for as long as this process lives."""
    return next(dist.rendezvous("env://"))


def local_rank() -> int:
    """Number of this process on its machine: which GPU is its own."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextlib.contextmanager
def _one_fate() -> Iterator[None]:
    if _Fate.depth == 0:
        _Fate.jobs, _Fate.turns = _Fate.jobs + 1, 0
    _Fate.depth += 1
    try:
        yield
    except Exception as error:
        if world_size() == 1:
            raise
        told = _tell(error)
        if told is None:
            raise
        raise _told_error(told) from error
    finally:
        _Fate.depth -= 1


def _tell(error: Exception) -> dict[str, Any] | None:
    """Tell the others of an error, unless it only follows from another rank's: that one's is given."""
    try:
        patience = time.monotonic() + (5.0 if _is_broken_connection(error) else 0.0)
        while not _failed():
            if time.monotonic() > patience:
                code = getattr(error, "exit_code", 1)
                told = {"rank": rank(), "text": str(error) or type(error).__name__, "exit_code": code}
                if _is_broken_connection(error):
                    return {**told, "rank": None, "text": "another process of this run has ended"}
                _store().set(_Fate.key("failed"), json.dumps(told))
                return None
            time.sleep(0.05)
        told = _told()
    except RuntimeError:  # the store has gone with the rank that held it
        return {"rank": None, "text": "another process of this run has ended", "exit_code": 1}
    return None if told["rank"] == rank() else told


def _failed() -> bool:
    return _store().check([_Fate.key("failed")])


def _told() -> dict[str, Any]:
    return json.loads(_store().get(_Fate.key("failed")))


def _told_error(told: dict[str, Any]) -> SteerkitError:
    kind = InputError if told["exit_code"] == InputError.exit_code else SteerkitError
    who = "Stopped" if told["rank"] is None else f"Rank {told['rank']} stopped"
    return kind(f"{who}: {told['text']}")


def _is_broken_connection(error: Exception) -> bool:
    words = (
        "connection closed",
        "connection reset",
        "connection refused",
        "broken pipe",
        "timed out",
        "gloo",
    )
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    )


def _meet() -> None:
    """Wait for all ranks, without the connections that some may be about to close."""
    store, key = _store(), _Fate.next_turn()
    store.add(key, 1)
    with contextlib.suppress(RuntimeError):  # the store ends with the rank that holds it
        while store.add(key, 0) < world_size() and not _failed():
            time.sleep(0.02)


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()
