"""The ranks of one model, each a process with a device of its own: what they add up on the way through the
layers (Comm), and how each step's plan reaches them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import msgspec
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed import Store
from torch.distributed.distributed_c10d import _set_pg_timeout

from pagetide.runner.device import Device
from pagetide.runner.plan import StepPlan, StepTokens
from pagetide.runner.runner import Runner

# A rank that is stuck is the watchdog's affair (step_timeout_s): an idle engine waits as long.
_PATIENCE = timedelta(days=365)
_FIRST_BYTES = 16_384  # a message's length and as much of it as comes in one go: most plans whole
_LENGTH_BYTES = 8
_LOOPBACK = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


class TorchComm:
    """ops.comm.Comm by torch.distributed: NCCL between GPUs, Gloo between CPUs.

    store: where the ranks meet, the same for all. is_local: all are on this machine, and listen on nothing
    but its loopback device. A process can have one of these at a time.
    """

    def __init__(
        self, device: Device, store: Store, rank: int, size: int, is_local: bool, start_timeout_s: float
    ):
        if dist.is_initialized():
            raise RuntimeError("this process has an engine of several ranks already; close it first")
        self.rank, self.size = rank, size
        backend = "gloo" if device.torch_device.type == "cpu" else "nccl"
        timeout = timedelta(seconds=start_timeout_s)
        try:
            with _loopback_only() if is_local else contextlib.nullcontext():
                dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
                self.hosts = dist.new_group(backend="gloo", timeout=timeout)  # of the processes, for plans
                # NCCL connects with the first sum.
                dist.all_reduce(torch.zeros(1, device=device.torch_device))
            for group in (dist.group.WORLD, self.hosts):
                _set_pg_timeout(_PATIENCE, group)
        except BaseException:
            self.close()
            raise
        self._widths: list[int] = []

    def all_reduce(self, x: torch.Tensor) -> None:
        dist.all_reduce(x)

    def gather(self, columns: torch.Tensor) -> torch.Tensor:
        widths = self._widths or self._ask_widths(columns)
        widest = max(widths)
        own = F.pad(columns, (0, widest - columns.shape[1])).contiguous()
        if self.rank:
            dist.gather(own, dst=0)
            return columns
        parts = [torch.empty_like(own) for _ in widths]
        dist.gather(own, parts, dst=0)
        return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], 1)

    def _ask_widths(self, columns: torch.Tensor) -> list[int]:
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, columns.shape[1], group=self.hosts)
        self._widths = found
        return found

    def broadcast(self, x: torch.Tensor) -> None:
        dist.broadcast(x, src=0)

    def smallest(self, value: int) -> int:
        return self._agree(value, dist.ReduceOp.MIN)

    def total(self, value: int) -> int:
        return self._agree(value, dist.ReduceOp.SUM)

    def _agree(self, value: int, how: dist.ReduceOp.RedOpType) -> int:
        tensor = torch.tensor([value])
        dist.all_reduce(tensor, how, group=self.hosts)
        return int(tensor)

    def close(self) -> None:
        """Leaves the group, if it is in one, after which the process may join another."""
        if dist.is_initialized():
            dist.destroy_process_group()


@contextlib.contextmanager
def _loopback_only() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in _LOOPBACK}
    os.environ.update(dict.fromkeys(_LOOPBACK, "lo"))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


class PlanChannel:
    """Plans from rank 0 to all others, one broadcast a step; None says that no more come."""

    def __init__(self, comm: TorchComm):
        self._comm = comm
        self._encoder = msgspec.msgpack.Encoder(enc_hook=_encode_array)
        self._decoder = msgspec.msgpack.Decoder(StepPlan | None, dec_hook=_decode_array)

    def send(self, plan: StepPlan | None) -> None:
        body = self._encoder.encode(plan)
        message = len(body).to_bytes(_LENGTH_BYTES, "little") + body
        size = max(_FIRST_BYTES, len(message))
        whole = torch.zeros(size, dtype=torch.uint8)
        whole[: len(message)] = torch.frombuffer(bytearray(message), dtype=torch.uint8)
        for part in whole.split([_FIRST_BYTES, size - _FIRST_BYTES]):
            if len(part):
                dist.broadcast(part.contiguous(), src=0, group=self._comm.hosts)

    def receive(self) -> StepPlan | None:
        first = self._receive_bytes(_FIRST_BYTES)
        length = int.from_bytes(first[:_LENGTH_BYTES], "little")
        missing = _LENGTH_BYTES + length - _FIRST_BYTES
        body = first[_LENGTH_BYTES : _LENGTH_BYTES + length]
        if missing > 0:
            body += self._receive_bytes(missing)
        return self._decoder.decode(body)

    def _receive_bytes(self, size: int) -> bytes:
        found = torch.empty(size, dtype=torch.uint8)
        dist.broadcast(found, src=0, group=self._comm.hosts)
        return found.numpy().tobytes()


def _encode_array(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    raise NotImplementedError(f"a plan has no room for {type(value)}")


def _decode_array(kind: type, value: Any) -> Any:
    assert kind is np.ndarray
    dtype, shape, data = value
    return np.frombuffer(bytearray(data), dtype).reshape(shape)


class LeadingRunner:
    """engine.StepRunner on rank 0: all ranks run its plans. on_close: called when the others have been told
    that no more come.
    """

    def __init__(self, runner: Runner, comm: TorchComm, on_close: Callable[[], None]):
        self._runner, self._comm, self._on_close = runner, comm, on_close
        self._channel = PlanChannel(comm)

    def forward(self, plan: StepPlan) -> None:
        self._channel.send(plan)
        self._runner.forward(plan)

    def sample(self, plan: StepPlan, masks: np.ndarray | None = None) -> None:
        self._runner.sample(plan, masks)

    def wait(self, plan: StepPlan) -> StepTokens:
        return self._runner.wait(plan)

    def close(self) -> None:
        with contextlib.suppress(RuntimeError):  # a rank that has ended needs no word
            self._channel.send(None)
        self._runner.close()
        self._comm.close()
        self._on_close()


def follow(runner: Runner, comm: TorchComm) -> None:
    """Runs rank 0's plans until there are no more. Raises what a step raises."""
    channel, last = PlanChannel(comm), None
    while (plan := channel.receive()) is not None:
        runner.forward(plan)
        runner.sample(plan)
        # A device that works beside the host gets the next plan before it has done this one.
        done, last = (last, plan) if runner.device.overlaps else (plan, None)
        if done is not None:
            runner.finish(done)
    runner.close()
    comm.close()
