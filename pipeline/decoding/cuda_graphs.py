"""What makes a step of fixed shapes cheap on a GPU: it is captured as a CUDA graph once and replayed from then on.

A step of a 7B model takes some 1,000 kernel launches, 20 ms and more of Python for 4 ms of reading weights; a replayed
graph is one launch.
"""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial, wraps
from importlib.util import find_spec
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

P = ParamSpec("P")
T = TypeVar("T")


class ReplayedStep:
    """A function of tensors that stay where they are: run twice it is captured, from then on replayed.

    The first call runs it eagerly, which compiles and allocates what a capture must not. On other devices than CUDA
    every call does.

    Args:
        function: reads and writes the same tensors at every call, and never waits for the device.
        device: where it runs.
    """

    def __init__(self, function: Callable[[], Tensor], device: torch.device) -> None:
        self._function, self._device = function, device
        self._graph: torch.cuda.CUDAGraph | None = None
        self._output: Tensor | None = None
        self._calls = 0

    def __call__(self) -> Tensor:
        """The function's output; what an earlier call returned is overwritten."""
        self._calls += 1
        if self._device.type != "cuda" or self._calls == 1:
            return self._function()
        if self._graph is None:
            self._capture()
        if self._graph is None:  # it cannot be captured
            return self._function()
        self._graph.replay()
        assert self._output is not None
        return self._output

    def _capture(self) -> None:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        try:
            # Other threads of a server may go on allocating meanwhile.
            with torch.cuda.device(self._device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._output = self._function()
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # which a capture that breaks off leaves changed
            causes = list(_causes(error))
            if any(map(lacks_memory, causes)):
                raise torch.OutOfMemoryError(str(error)) from error
            reason = str(causes[-1]).strip().splitlines()[0]
            warnings.warn(f"a step cannot be replayed as a CUDA graph ({reason}): it runs eagerly.", stacklevel=2)
            self._device = torch.device("cpu")
            return
        self._graph = graph


def lacks_memory(error: BaseException) -> bool:
    """Whether an error of torch is a lack of memory, which allocators and libraries report each in its own way."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    signs = ("allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__context__


@contextmanager
def fused_elementwise(model: PreTrainedModel) -> Iterator[None]:
    """Inside, norms and rotary embeddings are one kernel each instead of eight and ten (torch.compile).

    Python runs a captured step only once, so they are exchanged in the model for that time alone.
    """
    rotary = "apply_rotary_pos_emb"
    modules = {sys.modules[type(module).__module__] for module in model.modules()}
    before = {module: getattr(module, rotary) for module in modules if hasattr(module, rotary)}
    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    try:
        for module, function in before.items():
            setattr(module, rotary, _compiled(function))
        for norm in norms:
            norm.forward = partial(_compiled(type(norm).forward), norm)
        yield
    finally:
        for module, function in before.items():
            setattr(module, rotary, function)
        for norm in norms:
            norm.__dict__.pop("forward", None)


def side_by_side(
    first_task: Callable[[], Tensor], second_task: Callable[[], Tensor], *, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The results of two functions that do not wait for each other: at the same time in a graph, else one by one."""
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        return first_task(), second_task()
    stream, side = torch.cuda.current_stream(device), _side_stream(device)
    side.wait_stream(stream)
    with torch.cuda.stream(side):
        first = first_task()
    second = second_task()
    stream.wait_stream(side)
    return first, second


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def fused(function: Callable[P, T]) -> Callable[P, T]:
    """One kernel of a function that is made of small ones (torch.compile), where its tensors are on a GPU."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        on_gpu = any(isinstance(value, Tensor) and value.is_cuda for value in args)
        return (_compiled(function) if on_gpu else function)(*args, **kwargs)

    return run


@cache
def _compiled(function: Callable[P, T]) -> Callable[P, T]:
    return torch.compile(function, dynamic=True) if find_spec("triton") else function


class Arriving:
    """Numbers being copied from the device; work queued there later does not delay them."""

    def __init__(self, numbers: Tensor) -> None:
        self._numbers, self._arrived = numbers, None
        if numbers.is_cuda:
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._arrived = torch.cuda.current_stream(numbers.device).record_event()

    def tolist(self) -> list[Any]:
        """Wait for them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._numbers.tolist()
