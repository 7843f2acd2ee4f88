"""Every backend that can run here against torch.nn.LSTM in fp64: every output and every gradient.

A backend's error, ||a - fp64|| / ||fp64||, is at most twice that of torch.nn.LSTM in the same dtype plus one rounding
of the result. Small cases pool several draws, so that a lucky single number of either side decides nothing.
"""

from __future__ import annotations

import copy
import math
import os

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import lstm_fast
from lstm_fast.kernels import persistent

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
FP64_ERROR = 1e-13  # the oracle's own dtype
_POOLED = 2000  # elements of y whose errors are judged together, in up to 8 draws,
_FEWEST = 32  # and of the smallest result
# T, B, features, H
SHAPES = [(T, B, 5, H) for H in (1, 7, 33, 100, 257) for B in (1, 3, 17) for T in (1, 2, 63)]
SLOW_SHAPES = [(T, B, 5, H) for H, B, T in ((1, 1, 2), (7, 3, 1), (33, 17, 2), (100, 1, 2), (129, 3, 2), (7, 3, 25))]


def device_of(backend: str) -> str:
    """Where the backend runs here; skips, with the reason, if nowhere."""
    status = lstm_fast.backends()[backend]
    if not status.available:
        pytest.skip(f"{backend}: {status.detail}")
    return "cuda" if backend in ("persistent", "cuda", "triton") and torch.cuda.is_available() else "cpu"


def cases():
    for backend in ("reference", "cpu", "triton", "persistent", "cuda"):
        marks = [pytest.mark.gpu] if backend == "cuda" else []
        interpreted = backend in ("triton", "persistent") and not torch.cuda.is_available()
        for dtype in DTYPES:
            if backend in ("triton", "persistent") and dtype == "fp64":
                continue
            for shape in SLOW_SHAPES if interpreted else SHAPES:
                T, B, _, H = shape
                yield pytest.param(backend, dtype, shape, marks=marks, id=f"{backend}-{dtype}-T{T}B{B}H{H}")


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan():
    """torch.empty then returns NaN: an element that no kernel wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def _strict_fp32(monkeypatch):
    """On both sides: cuDNN doesn't use TF32 for every size where it may."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(autouse=True)
def _persistent_kernels_run_on_the_host(monkeypatch):
    """Without a GPU: through the whole module, as on one."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(persistent, "unavailable", lambda: None)
        monkeypatch.setattr(persistent, "refuses", lambda device, dtype, hidden: None)


def run(module: nn.Module, x: Tensor, hx: list[Tensor], lengths: list[int] | None, upstream: list[Tensor]):
    """Outputs and gradients by name, as fp64 on the CPU."""
    parameter = next(module.parameters())
    place = {"device": parameter.device, "dtype": parameter.dtype}
    x, h0, c0 = (t.to(**place, copy=True).requires_grad_() for t in (x, *hx))
    module.zero_grad()
    sequence = x if lengths is None else pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
    y, (h_n, c_n) = module(sequence, (h0, c0))
    y = y.data if isinstance(y, PackedSequence) else y
    torch.autograd.backward((y, h_n, c_n), [g.to(**place) for g in upstream])
    found = {"y": y, "h_n": h_n, "c_n": c_n, "dx": x.grad, "dh_0": h0.grad, "dc_0": c0.grad}
    found.update({f"d{name}": p.grad for name, p in module.named_parameters()})
    return {name: t.detach().cpu().double() for name, t in found.items()}


def compare(backend: str, dtype: str, shape, bidirectional: bool, lengths: list[int] | None = None, scale: float = 1.0):
    T, B, _, H = shape
    device = device_of(backend)
    wanted = max(_POOLED / (T * B * H), _FEWEST / (H * min(4, B)))  # biases' gradients have 4H numbers, states B*H
    draws = 1 if backend == "triton" and T > 2 else min(8, math.ceil(wanted))
    square: dict[str, list[float]] = {}  # by result: |ours - exact|^2, |theirs - exact|^2, |exact|^2
    for seed in range(draws):
        torch.manual_seed(seed)
        for name, trio in _errors(backend, device, DTYPES[dtype], shape, bidirectional, lengths, scale).items():
            square[name] = [a + b for a, b in zip(square.get(name, [0.0] * 3), trio, strict=True)]
    for name, (ours, theirs, size) in square.items():
        error, allowed = (ours / size) ** 0.5, (theirs / size) ** 0.5
        bound = FP64_ERROR if dtype == "fp64" else 2 * allowed + torch.finfo(DTYPES[dtype]).eps
        assert error <= bound, f"{name}: relative error {error:.2e}, torch.nn.LSTM's {allowed:.2e}, bound {bound:.2e}"


def _errors(backend, device, dtype, shape, bidirectional, lengths, scale) -> dict[str, tuple[float, float, float]]:
    T, B, features, H = shape
    D = 1 + bidirectional
    rounded = nn.LSTM(features, H, bidirectional=bidirectional).to(dtype)
    rows = (T, B) if lengths is None else (sum(lengths),)
    x, *hx = (
        t.to(dtype).double() for t in (scale * torch.randn(T, B, features), torch.randn(D, B, H), torch.randn(D, B, H))
    )
    upstream = [t.to(dtype).double() for t in (torch.randn(*rows, D * H), torch.randn(D, B, H), torch.randn(D, B, H))]
    exact = run(copy.deepcopy(rounded).double(), x, hx, lengths, upstream)
    theirs = run(copy.deepcopy(rounded).to(device), x, hx, lengths, upstream)
    module = lstm_fast.LSTM(features, H, bidirectional=bidirectional, dtype=dtype, device=device, backend=backend)
    module.load_state_dict(rounded.state_dict())
    ours = run(module, x, hx, lengths, upstream)
    return {
        name: tuple(t.square().sum().item() for t in (ours[name] - want, theirs[name] - want, want))
        for name, want in exact.items()
    }


@pytest.mark.parametrize("backend, dtype, shape", list(cases()))
def test_dense(backend, dtype, shape):
    compare(backend, dtype, shape, bidirectional=False)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "backend", ["reference", "cpu", "triton", "persistent", pytest.param("cuda", marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("H", [7, 33])
def test_packed_in_both_directions(backend, dtype, H):
    lengths = [2, 6, 1, 6, 3]
    compare(backend, dtype, (6, 5, 5, H), bidirectional=True, lengths=lengths)


@pytest.mark.parametrize("backend", ["reference", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_large_products_in_both_directions(backend):
    compare(backend, "fp32", (63, 3, 257, 257), bidirectional=True, lengths=[63, 40, 17])


@pytest.mark.parametrize(
    "backend", ["reference", "cpu", "triton", "persistent", pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_saturated_gates(backend):
    """Pre-activations in the hundreds: the gates are exactly 0, 1 or -1 and nothing overflows."""
    compare(backend, "fp32", (3, 3, 5, 33), bidirectional=True, scale=1e3)


@pytest.mark.parametrize("backend", ["cpu", "triton", "persistent", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_same_bits_on_every_run(backend):
    device = device_of(backend)
    torch.manual_seed(0)
    module = lstm_fast.LSTM(5, 33, bidirectional=True, device=device, backend=backend)
    x = torch.randn(4, 9, 5)
    hx = [torch.randn(2, 9, 33) for _ in range(2)]
    upstream = [torch.randn(4, 9, 66), *hx]
    first = run(module, x, hx, None, upstream)
    for _ in range(3):
        again = run(module, x, hx, None, upstream)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "backend", ["reference", "cpu", "triton", "persistent", pytest.param("cuda", marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("hidden", [17, 18])
def test_inference_equals_training_and_nan_stays_in_its_row(backend, dtype, hidden):
    device = device_of(backend)
    inputs = 5 if backend in ("reference", "cpu") else 4  # torch.mm with AMX reads on into the next row where it is odd
    torch.manual_seed(0)
    module = lstm_fast.LSTM(inputs, hidden, device=device, dtype=DTYPES[dtype], backend=backend)
    x = torch.randn(4, 6, inputs, device=device, dtype=DTYPES[dtype])
    trained = module(x)[0].detach()
    with torch.no_grad():
        assert torch.equal(module(x)[0], trained)
        x[2, 3, 0] = float("nan")
        y = module(x)[0]
    assert y[2:, 3].isnan().all()
    y[2:, 3] = trained[2:, 3]
    assert torch.equal(y, trained)
