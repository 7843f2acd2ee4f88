"""Which kernel serves a call, and why: the only place that decides."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch

from lstm_fast import measured
from lstm_fast.kernels import cpu, cuda, dtype_name, persistent, triton_gates

try:
    from lstm_fast._C import environment_has  # in a tenth of the time that os.environ takes
except ImportError:

    def environment_has(name: str) -> bool:
        return name in os.environ


KERNELS: dict[str, ModuleType] = {"persistent": persistent, "cuda": cuda, "triton": triton_gates, "cpu": cpu}
BACKENDS = ("auto", *KERNELS, "reference")
_AUTO_ORDER = {"cuda": ("persistent",), "cpu": ("cpu",)}
_PROJECTS = ("cpu",)
_CPU = torch.device("cpu")
_VARIABLE = "LSTM_FAST_BACKEND"
# Two launches a step are slower than cuDNN, and faster than the reference: they serve graphs, which can't hold cuDNN's.
_COMPILED_ORDER = {**_AUTO_ORDER, "cuda": ("persistent", "cuda", "triton")}


class Choice(NamedTuple):
    """``backend`` is a key of KERNELS, "reference", or "torch" for torch's own LSTM; ``reason`` says why in words."""

    backend: str
    reason: str


class Status(NamedTuple):
    """Whether a backend can run in this process; ``detail`` says what it is, or what it lacks."""

    available: bool
    detail: str


_WHAT = {
    "persistent": "the whole recurrence in one launch",
    "cuda": "one library GEMM and one fused CUDA C++ gate kernel a step",
    "triton": "one library GEMM and one fused Triton gate kernel a step",
    "cpu": "a whole layer in one C++ call",
    "reference": "the equations in plain torch, any device",
}


# What `choose` says where `surely_cpu` is true, by the keyword.
_SURELY = {"auto": Choice("cpu", _WHAT["cpu"]), "cpu": Choice("cpu", "asked for")}


def backends() -> dict[str, Status]:
    """Every backend by name, and whether it can run in this process; for one that can't, why."""
    missing = {name: kernel.unavailable() for name, kernel in KERNELS.items()}
    return {name: Status(missing.get(name) is None, missing.get(name) or what) for name, what in _WHAT.items()}


def check_backend(name: str) -> str:
    """``name`` itself; ValueError unless it is one of BACKENDS."""
    if name not in BACKENDS:
        raise ValueError(f"backend should be one of {', '.join(BACKENDS)}, got: {name!r}")
    return name


def requested(backend: str) -> str:
    """The keyword if it names a backend, else what LSTM_FAST_BACKEND names, else "auto"."""
    if backend != "auto":
        return check_backend(backend)
    name = os.environ.get(_VARIABLE) or "auto"
    if name not in BACKENDS:
        raise ValueError(f"{_VARIABLE} should be one of {', '.join(BACKENDS)}, got: {name!r}")
    return name


def choose(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    hidden: int,
    proj_size: int,
    traced: bool,
    transformed: bool,
    kind: str,
    shape: Callable[[], tuple[int, int]],
) -> Choice:
    """The kernel for one call.

    ``backend`` is the module's keyword. ``traced``: the call is recorded by torch.jit or for ONNX; ``transformed``: a
    torch.func transform or forward-mode AD is active. ``kind`` is ``measured.Call``'s, and ``shape()`` gives T and B.
    ``auto`` falls back, to torch too where that was measured to be faster; a named backend that can't serve raises
    RuntimeError, saying what is missing.
    """
    compiling = torch.compiler.is_compiling()
    plain = device.type == "cpu" and not (compiling or traced or transformed)
    serves = plain and _kernel_refuses("cpu", device, dtype, hidden) is None
    if serves and surely_cpu(backend, dtype, hidden, kind, shape):
        return _SURELY[backend]
    name = requested(backend)
    if traced:
        return Choice("torch", "the call is being traced, and traced graphs hold aten::lstm")
    if name != "auto":
        why_not = _refuses(name, device, dtype, hidden, proj_size, transformed)
        if why_not is not None:
            raise RuntimeError(f'backend="{name}" cannot serve this call: {why_not}')
        return Choice(name, "asked for")
    if transformed:
        return Choice("reference", "a torch.func transform or forward-mode AD is active, which kernels can't follow")
    reasons: list[str] = []
    order = _COMPILED_ORDER if compiling else _AUTO_ORDER
    for candidate in order.get(device.type, ()):
        why_not = _refuses(candidate, device, dtype, hidden, proj_size, transformed)
        if why_not is None and not compiling:
            why_not = _torch_is_faster(device, dtype, hidden, kind, shape)
        if why_not is None:
            return Choice(candidate, _WHAT[candidate] + (f" ({'; '.join(reasons)})" if reasons else ""))
        reasons.append(f"{candidate}: {why_not}")
    reasons = reasons or [f"no kernel serves device {device.type}"]
    if compiling and dtype.is_floating_point:
        return Choice("reference", "; ".join([*reasons, "torch's own LSTM would break the compiled graph"]))
    return Choice("torch", "; ".join(reasons))


def surely_cpu(backend: str, dtype: torch.dtype, hidden: int, kind: str, shape: Callable[[], tuple[int, int]]) -> bool:
    """Whether the CPU's kernel takes tensors that are there and that it doesn't refuse, if neither tracer nor transform
    is at work; False may mean that a closer look is needed."""
    if backend != "auto":
        return backend == "cpu"
    if environment_has(_VARIABLE):
        return False
    return (
        not measured.matters(measured.place(_CPU), kind) or _torch_is_faster(_CPU, dtype, hidden, kind, shape) is None
    )


def _torch_is_faster(
    device: torch.device, dtype: torch.dtype, hidden: int, kind: str, shape: Callable[[], tuple[int, int]]
) -> str | None:
    """In words; None if it was not measured to be, nor is expected to be where nothing like it was measured."""
    time, batch = shape()
    call = measured.Call(measured.place(device), dtype_name(dtype), kind, torch.is_grad_enabled(), time, batch, hidden)
    if device.type == "cuda":
        asked = device, dtype, hidden, batch
        crowded: str | None = persistent.crowded(*asked)
        if crowded is not None:
            return crowded
        if not measured.covers(call):
            outweighed: str | None = persistent.outweighed(*asked, plain=kind == "layer")
            return outweighed
    return measured.torch_is_faster(call)


def _refuses(
    name: str, device: torch.device, dtype: torch.dtype, hidden: int, proj_size: int, transformed: bool
) -> str | None:
    if name == "reference":
        return None if dtype.is_floating_point else f"{dtype} is not a floating-point dtype"
    if transformed:
        return "a torch.func transform or forward-mode AD is active, which only the reference follows"
    why_not: str | None = _kernel_refuses(name, device, dtype, hidden)
    if why_not is None and proj_size > 0 and name not in _PROJECTS:
        why_not = f"it has no projections (proj_size={proj_size})"
    return why_not


def _kernel_refuses(name: str, device: torch.device, dtype: torch.dtype, hidden: int) -> str | None:
    """Asked of the kernel itself, which asks the machine: a compiler calls this, and doesn't look inside."""
    kernel = KERNELS[name]
    why_not: str | None = kernel.unavailable() or kernel.refuses(device, dtype, hidden)
    return why_not


# What torch.compiler.assume_constant_result does, but that imports the compiler: a second, at each start.
_kernel_refuses._dynamo_marked_constant = True  # type: ignore[attr-defined]
