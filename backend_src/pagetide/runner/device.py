"""What differs between devices: how work is queued, how results reach the host, how much memory the KV
cache may take.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from pagetide.config import Settings, SettingsError

Result = TypeVar("Result")


class Device(Protocol):
    """A queue of work that keeps its order, like a CUDA stream."""

    torch_device: torch.device
    activation_dtype: torch.dtype | None  # None: that of the weights
    overlaps: bool  # computes beside the host, not in its place
    records: bool  # record() saves launches
    num_free_tokens: int  # of a step that take about as long as reading the weights does

    def run(self, function: Callable[..., Result], *args: Any) -> Result:
        """Runs the function where the kernels run, and waits for what it returns."""

    def queue(self, function: Callable[..., Any], *args: Any) -> None:
        """Runs the function behind everything queued before, and returns at once."""

    def fetch(
        self, function: Callable[..., list[torch.Tensor]], *args: Any
    ) -> Callable[[], list[np.ndarray]]:
        """Like queue; the result waits for the function's tensors, on the host, and raises what anything
        queued has raised.
        """

    def record(self, function: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        """Records what the function queues. Returns what queues all of it again, with what lies in the same
        tensors then, and the function's result, which each replay fills anew until another recording's does.
        """

    def kv_cache_bytes(self, settings: Settings, try_steps: Callable[[], None]) -> int:
        """How many bytes the KV cache may take, now that the weights are loaded. try_steps: runs the largest
        usual steps, whose memory is then known.

        Raises SettingsError if nothing is left.
        """

    def host_cache_bytes(self, settings: Settings) -> int:
        """How many bytes of the host's memory may keep blocks that the device has no room for.

        Raises SettingsError where there is no such memory.
        """

    def close(self) -> None:
        """Waits for what is queued."""


class CpuDevice:
    """One worker thread for all kernels: an OpenMP pool belongs to the thread that opens it.

    share: as open_pools takes it.
    """

    torch_device = torch.device("cpu")
    activation_dtype: torch.dtype | None = torch.float32
    overlaps = False
    records = False
    num_free_tokens = 20

    def __init__(self, num_threads: int, share: tuple[int, int] = (0, 1)):
        self._worker = ThreadPoolExecutor(1, "pagetide-device")
        self._queued: list[Future[Any]] = []
        from pagetide.ops.cpu.threads import open_pools  # imports Numba, which a GPU does not need

        self.run(open_pools, num_threads, share)

    def run(self, function: Callable[..., Result], *args: Any) -> Result:
        return self._worker.submit(function, *args).result()

    def queue(self, function: Callable[..., Any], *args: Any) -> None:
        self._queued.append(self._worker.submit(function, *args))

    def fetch(
        self, function: Callable[..., list[torch.Tensor]], *args: Any
    ) -> Callable[[], list[np.ndarray]]:
        before, self._queued = self._queued, []
        future = self._worker.submit(function, *args)

        def wait() -> list[np.ndarray]:
            for queued in before:
                queued.result()
            return [tensor.numpy() for tensor in future.result()]

        return wait

    def record(self, function: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        raise NotImplementedError("a CPU launches nothing")

    def kv_cache_bytes(self, settings: Settings, try_steps: Callable[[], None]) -> int:
        return int(settings.kv_cache_gb * 2**30)

    def host_cache_bytes(self, settings: Settings) -> int:
        if settings.swap_space_gb:
            raise SettingsError(
                f"swap_space_gb is {settings.swap_space_gb:g}, but on a CPU the KV cache is in the host's "
                "memory already; use 0, and kv_cache_gb for its size"
            )
        return 0

    def close(self) -> None:
        self._worker.shutdown()


class CudaDevice:
    """The current CUDA stream of one GPU; results come through pinned memory and an event."""

    activation_dtype: torch.dtype | None = None
    overlaps = True
    num_free_tokens = 128

    def __init__(self, records: bool, index: int) -> None:
        self.records = records
        torch.cuda.set_device(index)
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        self._graphs = torch.cuda.graph_pool_handle()

    def run(self, function: Callable[..., Result], *args: Any) -> Result:
        return function(*args)

    def queue(self, function: Callable[..., Any], *args: Any) -> None:
        function(*args)

    def fetch(
        self, function: Callable[..., list[torch.Tensor]], *args: Any
    ) -> Callable[[], list[np.ndarray]]:
        hosts = []
        for result in function(*args):
            host = torch.empty(result.shape, dtype=result.dtype, pin_memory=True)
            hosts.append(host.copy_(result, non_blocking=True))
        done = torch.cuda.Event()
        done.record()

        def wait() -> list[np.ndarray]:
            done.synchronize()
            return [host.numpy() for host in hosts]

        return wait

    def record(self, function: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        function()  # compiles what it needs, which is not allowed while a graph is captured
        torch.cuda.synchronize(self.torch_device)
        graph = torch.cuda.CUDAGraph()
        # Other threads of the process may go on with what they do on the device.
        with torch.cuda.graph(graph, pool=self._graphs, capture_error_mode="thread_local"):
            result = function()
        return graph.replay, result

    def kv_cache_bytes(self, settings: Settings, try_steps: Callable[[], None]) -> int:
        device = self.torch_device
        torch.cuda.reset_peak_memory_stats(device)
        try:
            try_steps()
            # What stays, of libraries and kernels, is no longer free anyhow.
            needed = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
        except torch.OutOfMemoryError:
            needed = None
        torch.cuda.empty_cache()  # of what loading and the steps have used for a while
        free, _ = torch.cuda.mem_get_info(device)
        left = 0 if needed is None else int(free * settings.gpu_memory_fraction) - needed
        if left <= 0:
            need = "more" if needed is None else f"{needed / 2**30:.1f} GiB"
            raise SettingsError(
                f"no memory is left for the KV cache: beside the weights {free / 2**30:.1f} GiB are free, of "
                f"which gpu_memory_fraction lets {settings.gpu_memory_fraction:g} be used, and the largest "
                f"steps need {need}; lower max_num_batched_tokens or max_num_seqs, or use a quantization"
            )
        return left

    def host_cache_bytes(self, settings: Settings) -> int:
        return int(settings.swap_space_gb * 2**30)

    def close(self) -> None:
        torch.cuda.synchronize(self.torch_device)


def select_device(settings: Settings, rank: int = 0) -> Device:
    """The device that the settings ask for, or this rank's share of it; raises SettingsError if this machine
    has none of the kind.
    """
    local_size = settings.local_size
    local_rank = rank % local_size
    has_gpu = torch.cuda.is_available()
    if settings.device == "cuda" and not has_gpu:
        raise SettingsError("device is cuda, but torch sees no CUDA GPU here; use auto or cpu")
    if not has_gpu or settings.device == "cpu":
        return CpuDevice(settings.num_threads, (local_rank, local_size))
    if local_size > torch.cuda.device_count():
        raise SettingsError(
            f"{local_size} ranks are to run on this machine, each on a GPU of its own, but torch sees "
            f"{torch.cuda.device_count()} (tensor_parallel_size, ranks_per_node)"
        )
    index = local_rank if local_size > 1 else torch.cuda.current_device()
    return CudaDevice(settings.cuda_graphs, index)
