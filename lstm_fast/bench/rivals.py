"""Whom lstm_fast is measured against, behind one interface.

Every module of one case computes the same: rivals take the weights of ``oracle``, a torch.nn.LSTM or LSTMCell, and a
module is called as that is, whatever its own library's form is.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import lstm_fast
from lstm_fast.bench.cases import Case
from lstm_fast.kernels import dtype_name

_UNROLLED = 32  # steps that torch.compile writes out one by one, in seconds


class Rival:
    """One implementation."""

    def missing(self) -> str | None:
        """What this process lacks to run it."""
        return None

    def refuses(self, case: Case, device: str) -> str | None:
        """Why a case can't run."""
        return None

    def build(self, case: Case, oracle: nn.Module) -> nn.Module:
        """A module with the oracle's weights, on its device."""
        raise NotImplementedError


def oracle(case: Case, device: str) -> nn.Module:
    """torch's own module, seeded."""
    torch.manual_seed(0)
    place: dict[str, Any] = {"device": device, "dtype": getattr(torch, case.dtype)}
    if case.cell:
        return nn.LSTMCell(case.inputs, case.H, **place)
    return nn.LSTM(case.inputs, case.H, case.layers, bidirectional=case.bidirectional, proj_size=case.P, **place)


def make_input(case: Case, device: str) -> Any:
    """[T, B, I], seeded; packed with lengths uniform in 1..T; [B, I] for a cell."""
    torch.manual_seed(1)
    place: dict[str, Any] = {"device": device, "dtype": getattr(torch, case.dtype)}
    if case.cell:
        return torch.randn(case.B, case.inputs, **place)
    x = torch.randn(case.T, case.B, case.inputs, **place)
    if not case.packed:
        return x
    return nn.utils.rnn.pack_padded_sequence(x, torch.randint(1, case.T + 1, (case.B,)), enforce_sorted=False)


def output(result: Any) -> Tensor:
    """The states of every step, of what a module returned."""
    y = result[0]
    return y.data if isinstance(y, PackedSequence) else y


def ours(case: Case, source: nn.Module, backend: str = "auto") -> lstm_fast.LSTM | lstm_fast.LSTMCell:
    """lstm_fast's module with the weights of ``source``."""
    weight = next(source.parameters())
    place: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype, "backend": backend}
    module: lstm_fast.LSTM | lstm_fast.LSTMCell
    if case.cell:
        module = lstm_fast.LSTMCell(case.inputs, case.H, **place)
    else:
        kind: dict[str, Any] = {"bidirectional": case.bidirectional, "proj_size": case.P}
        module = lstm_fast.LSTM(case.inputs, case.H, case.layers, **kind, **place)
    module.load_state_dict(source.state_dict())
    return module


class _Torch(Rival):
    """torch.nn.LSTM: oneDNN on a CPU, cuDNN on a GPU."""

    def build(self, case: Case, oracle: nn.Module) -> nn.Module:
        return oracle


class _Reference(Rival):
    """The equations in plain torch, step by step."""

    def build(self, case: Case, oracle: nn.Module) -> nn.Module:
        return ours(case, oracle, backend="reference")


class _Compiled(_Reference):
    """torch.compile of the reference."""

    def refuses(self, case: Case, device: str) -> str | None:
        return None if case.T <= _UNROLLED else f"unrolling more than {_UNROLLED} steps takes minutes to compile"

    def build(self, case: Case, oracle: nn.Module) -> nn.Module:
        torch.compiler.reset()
        module = super().build(case, oracle)
        module.compile()
        return module


class _OneLayerOnGpu(Rival):
    """What the libraries below serve."""

    package: str
    dtypes: tuple[str, ...]

    def missing(self) -> str | None:
        return None if importlib.util.find_spec(self.package) else f"{self.package} is not installed"

    def refuses(self, case: Case, device: str) -> str | None:
        plain = case == Case(case.T, case.B, case.H, case.I, dtype=case.dtype) and case.dtype in self.dtypes
        return None if plain and device == "cuda" else f"it serves one dense layer in {', '.join(self.dtypes)} on a GPU"


class _Haste(_OneLayerOnGpu):
    """haste_pytorch.LSTM (LMNT), whose weights are [.., 4H] with gates i, g, f, o."""

    package = "haste_pytorch"
    dtypes = ("float32",)

    def build(self, case: Case, oracle: nn.Module) -> nn.Module:
        import haste_pytorch

        module: nn.Module = haste_pytorch.LSTM(input_size=case.inputs, hidden_size=case.H)
        w_ih, w_hh, b_ih, b_hh = (p.detach() for p in oracle.parameters())
        with torch.no_grad():
            for name, values in (("kernel", w_ih), ("recurrent_kernel", w_hh), ("bias", b_ih + b_hh)):
                i, f, g, o = values.chunk(4)
                getattr(module, name).copy_(torch.cat([i, g, f, o]).t())
        # else it would save in inference too what a backward pass needs
        module.register_forward_pre_hook(lambda called, _: called.train(torch.is_grad_enabled()) and None)
        return module


class _FlashRnn(_OneLayerOnGpu):
    """flashrnn's fused LSTM (Pöppel et al. 2024, arXiv:2412.07752) behind a library GEMM for the input."""

    package = "flashrnn"
    dtypes = ("bfloat16", "float16", "float32")

    def build(self, case: Case, oracle: nn.Module) -> nn.Module:
        return _FlashRnnModule(oracle)


class _FlashRnnModule(nn.Module):
    def __init__(self, oracle: nn.Module) -> None:
        super().__init__()
        w_ih, w_hh, b_ih, b_hh = (p.detach().clone() for p in oracle.parameters())
        hidden = w_hh.size(1)
        self.w_ih = nn.Parameter(w_ih)
        self.r = nn.Parameter(w_hh.view(4, 1, hidden, hidden))  # gates, heads, new, previous
        self.b = nn.Parameter((b_ih + b_hh).view(4, 1, hidden))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        from flashrnn import flashrnn

        steps, batch, _ = x.shape
        hidden = self.r.size(-1)
        gates = nn.functional.linear(x.transpose(0, 1), self.w_ih).view(batch, steps, 4, 1, hidden)
        start = x.new_zeros(2, batch, 1, 1, hidden)
        kind = {"function": "lstm", "backend": "cuda_fused", "dtype": dtype_name(x.dtype)}  # else it computes in bf16
        states, _ = flashrnn(gates, self.r, self.b, states=start, **kind)
        return (states[0, :, :, 0].transpose(0, 1),)  # [T, B, H]


RIVALS: dict[str, Rival] = {
    "torch": _Torch(),
    "flashrnn": _FlashRnn(),
    "haste": _Haste(),
    "reference": _Reference(),
    "compile": _Compiled(),
}
DEFAULT = ("torch", "flashrnn", "haste")  # the others are slow to run or to compile


def differentiable(x: Any) -> tuple[Any, Tensor]:
    """The input as a leaf whose gradient is asked for, as behind an embedding or another layer; and its values."""
    values: Tensor = (x.data if isinstance(x, PackedSequence) else x).detach().requires_grad_()
    return x._replace(data=values) if isinstance(x, PackedSequence) else values, values


def task(module: nn.Module, x: Any, mode: str, last: bool = False) -> Callable[[], Tensor]:
    """One call of ``mode``, which returns the output.

    "forward" saves what a backward pass needs; "forward+backward" gives the gradients of all weights and of the
    input, of all states or, with ``last``, of the last h alone.
    """
    leaf, values = differentiable(x)

    def infer() -> Tensor:
        with torch.no_grad():
            return output(module(x))

    def forward() -> Tensor:
        return output(module(leaf))

    def train() -> Tensor:
        module.zero_grad()
        values.grad = None
        result = module(leaf)
        of: Tensor = result[1][0] if last else output(result)
        of.backward(torch.ones_like(of))
        return output(result)

    return {"inference": infer, "forward": forward, "forward+backward": train}[mode]
