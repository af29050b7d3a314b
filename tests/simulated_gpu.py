"""A GPU that is simulated on the CPU: tensors that report device "cuda", with values computed by the CPU's kernels.

Code takes the branches that it takes on a GPU, and gets right numbers. What a GPU would refuse is refused: operations
on tensors of both devices, and waiting while a graph is recorded. Everything that would make the host wait for the
device is noted: reading a value, operations whose shape depends on values, and copies between the devices.

It does not show whether a kernel exists on a real GPU, nor any time. Kernels that the CPU lacks are in
`tests.simulated_kernels`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils._triton import has_triton

from dalle_zoo.models import cache
from dalle_zoo.models.attention import fused
from tests.simulated_kernels import KERNELS

aten = torch.ops.aten

ROOT = Path(__file__).parents[1]
INSIDE = "meta"
"""Device of the tensors as PyTorch's C++ code sees it: for "cuda", the backward pass would need a driver."""
CUDA = torch.device("cuda", 0)
VALUE_DEPENDENT = {
    aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.bincount.default,
    aten.repeat_interleave.Tensor, aten.equal.default,
}  # fmt: skip
"""Operations whose result has a shape, or is a number, that the host learns from the device."""
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.convolution.default}
"""Operations that autocast runs in its dtype."""


class SimulatedTensor(torch.Tensor):
    """A tensor on the simulated GPU; ``inner`` has its values on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> SimulatedTensor:
        out: SimulatedTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=INSIDE,
        )  # fmt: skip
        out.inner = inner
        return out

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} runs outside of the simulation")

    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"SimulatedTensor({self.inner!r})"

    def get_device(self) -> int:
        """Index of the device."""
        return 0

    def cpu(self, memory_format: torch.memory_format = torch.preserve_format) -> Tensor:
        """Copies to the CPU."""
        return self.to("cpu", memory_format=memory_format)

    def tolist(self) -> Any:
        """Reads all values."""
        return self.cpu().tolist()

    def __tensor_flatten__(self) -> tuple[list[str], None]:  # so that `nn.Module.to` exchanges parameters
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> SimulatedTensor:
        return SimulatedTensor(inner["inner"])


class Wait(NamedTuple):
    """An operation for which the host waits."""

    what: str
    """"read", "copy to the host", "copy to the device", or the name of an operation."""
    where: str
    """File and function of the innermost frame of this project."""


class SimulatedGPU(TorchDispatchMode):
    """Runs what is on the device; see the module.

    Attributes:
        waits: What made the host wait.
        recording: Operations of the graph that is recorded; None if none is.
        graphs: Graphs that were recorded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[Wait] = []
        self.recording: list[tuple[Any, Any, Any, Any]] | None = None
        self.graphs: list[SimulatedGraph] = []

    @contextmanager
    def new_waits(self) -> Iterator[list[Wait]]:
        """The waits inside the context."""
        found, before = [], len(self.waits)
        yield found
        found += self.waits[before:]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_gpu = [x for x in tensors if isinstance(x, SimulatedTensor)]
        device = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        created = device is not None and device.type in ("cuda", INSIDE)
        if not on_gpu and not created:
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            self._wait("read")
            return args[0].inner.item()
        if func in VALUE_DEPENDENT or _has_boolean_index(func, args):
            self._wait(func.overloadpacket.__name__)
        if func is aten._to_copy.default:
            return self._copied(args[0], kwargs, device)
        if func is aten.copy_.default and len(on_gpu) == 1 and isinstance(args[1], Tensor):
            self._transfer(isinstance(args[0], SimulatedTensor), args[1], args[2:] == (True,))
        else:
            _check_devices(func, tensors)
        wrappers = {id(x.inner): x for x in on_gpu}
        plain_args, plain_kwargs = tree_map(_inner, (args, kwargs))
        if created:
            plain_kwargs |= {"device": "cpu", "pin_memory": False}
        run = KERNELS.get(func, func)
        if func in PRODUCTS:
            plain_args = _in_one_dtype(plain_args)
        out = run(*plain_args, **plain_kwargs)
        if self.recording is not None:
            self.recording.append((run, plain_args, plain_kwargs, out))
        if func is aten.copy_.default and not isinstance(args[0], SimulatedTensor):
            return args[0]

        def wrapped(x: Any) -> Any:  # an operation in place returns its argument
            if not isinstance(x, Tensor):
                return x
            assert x.device.type == "cpu", f"{func} computed no values"
            return wrappers[id(x)] if id(x) in wrappers else SimulatedTensor(x)

        return tree_map(wrapped, out)

    def _copied(self, x: Tensor, kwargs: dict[str, Any], device: torch.device | None) -> Tensor:
        from_gpu = isinstance(x, SimulatedTensor)
        to_gpu = device.type in ("cuda", INSIDE) if device is not None else from_gpu
        if from_gpu != to_gpu:
            self._transfer(to_gpu, x, bool(kwargs.get("non_blocking")))
        plain = {"device": "cpu", "pin_memory": False} if device is not None else {}
        call = _inner(x), kwargs | plain
        out: Tensor = aten._to_copy.default(call[0], **call[1])
        if self.recording is not None:
            self.recording.append((aten._to_copy.default, call[:1], call[1], out))
        return SimulatedTensor(out) if to_gpu else out

    def _transfer(self, to_gpu: bool, x: Tensor, asynchronous: bool) -> None:
        # Numbers are read from the host's memory when the copy is requested, so they need no wait.
        if not asynchronous:
            self._wait("copy to the device" if to_gpu else "copy to the host")

    def _wait(self, what: str) -> None:
        if self.recording is not None:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({what})")
        frame: FrameType | None = sys._getframe()
        while frame is not None and not frame.f_code.co_filename.startswith((f"{ROOT}/dalle_zoo", f"{ROOT}/eval")):
            frame = frame.f_back
        code = None if frame is None else frame.f_code
        where = "elsewhere" if code is None else f"{Path(code.co_filename).relative_to(ROOT)}: {code.co_name}"
        self.waits.append(Wait(what, where))


def _inner(x: Any) -> Any:
    return x.inner if isinstance(x, SimulatedTensor) else x


def _has_boolean_index(func: Any, args: Any) -> bool:
    if func not in (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default):
        return False
    return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])


def _check_devices(func: Any, tensors: list[Tensor]) -> None:
    """Like PyTorch, accepts single numbers of the CPU next to tensors of the GPU."""
    stray = [x for x in tensors if not isinstance(x, SimulatedTensor) and x.ndim and x.device.type == "cpu"]
    if stray and len(stray) < len(tensors):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {func} got {[tuple(x.shape) for x in stray]} on the "
            "CPU and others on cuda:0"
        )


def _in_one_dtype(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Casts to the dtype of autocast inside it; in its backward pass, to the narrowest dtype."""
    floats = [x.dtype for x in args if isinstance(x, Tensor) and x.is_floating_point()]
    enabled = torch.is_autocast_enabled("cuda") and torch.float64 not in floats
    dtype = torch.get_autocast_dtype("cuda") if enabled else min(floats, key=lambda d: torch.finfo(d).bits)
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)


class SimulatedGraph:
    """`torch.cuda.CUDAGraph`: repeats the recorded operations on the same memory."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0

    def replay(self) -> None:
        """Runs all operations; the results replace those of the recording."""
        self.replays += 1
        for run, args, kwargs, before in self.calls:
            for old, new in zip(tree_leaves(before), tree_leaves(run(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class _NoGradients:
    """Inference mode, in which views of simulated tensors are impossible, as the absence of gradients."""

    def __init__(self, mode: bool) -> None:
        self.mode = mode

    def __enter__(self) -> None:
        self.before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(not self.mode)

    def __exit__(self, *_: object) -> None:
        torch._C._set_grad_enabled(self.before)


def _new_tensor(self: Tensor, data: Any, *, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
    """`Tensor.new_tensor`, which would leave out the values because C++ sees a tensor on "meta"."""
    return torch.tensor(data, dtype=dtype or self.dtype, device=device or self.device)


def _to(original: Callable[..., Any]) -> Callable[..., Any]:
    """`Tensor.to` with an index for every CUDA device, for which PyTorch would otherwise ask the driver."""

    def indexed(x: Any) -> Any:
        return CUDA if isinstance(x, str | torch.device) and torch.device(x).type == "cuda" else x

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = tuple(map(indexed, args)), {name: indexed(value) for name, value in kwargs.items()}
        return original(self, *args, **kwargs)

    return to


@contextmanager
def _nothing(*_: Any, **__: Any) -> Iterator[None]:
    yield


class _Stream:
    def wait_stream(self, other: Any) -> None:
        """Waits on the device, not on the host."""


@contextmanager
def simulated_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedGPU]:
    """Adds a GPU to this machine inside the context."""
    has_triton()  # PyTorch remembers the answer, which must be that of this machine
    gpu = SimulatedGPU()

    @contextmanager
    def record(graph: SimulatedGraph) -> Iterator[None]:
        gpu.recording = graph.calls
        gpu.graphs.append(graph)
        try:
            yield
        finally:
            gpu.recording = None

    class Generator(torch.Generator):
        def __new__(cls, device: Any = "cpu") -> Generator:
            return super().__new__(cls, "cpu")

    functions: dict[str, Callable[..., Any] | type] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_bf16_supported": lambda *_: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda *_: None,
        "get_device_name": lambda *_: "simulated",
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: SimpleNamespace(major=9, minor=0),
        "empty_cache": lambda: None,
        "manual_seed_all": lambda *_: None,
        "synchronize": lambda *_: gpu._wait("synchronize"),
        "CUDAGraph": SimulatedGraph,
        "graph": record,
        "Stream": _Stream,
        "current_stream": _Stream,
        "stream": _nothing,
        "device": _nothing,
    }
    with monkeypatch.context() as patch:
        for name, function in functions.items():
            patch.setattr(torch.cuda, name, function)
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch.setattr(torch, "Generator", Generator)
        patch.setattr(torch.Tensor, "to", _to(torch.Tensor.to))
        patch.setattr(torch.Tensor, "cuda", lambda self, device=None, **options: self.to(CUDA, **options))
        patch.setattr(torch.Tensor, "new_tensor", _new_tensor)
        patch.setattr(torch._C, "_InferenceMode", _NoGradients)
        for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
            patch.setattr(torch.optim.Optimizer, name, lambda self: None, raising=False)
        lift = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # so that `torch.tensor(…, device="cuda")` is a copy that is seen
        try:
            with gpu:
                yield gpu
        finally:
            torch._C._set_only_lift_cpu_tensors(lift)
            for remembered in (fused._works, cache._step_slots):  # of a device that is gone
                remembered.cache_clear()
