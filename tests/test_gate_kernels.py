"""The gate kernels and the stepwise recurrence around them, against fp64.

"host" is the CUDA kernel's own body in a loop on the CPU; "triton" runs in Triton's interpreter where there is no GPU,
which truncates to bf16 instead of rounding.
"""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lstm_fast.kernels import cuda, stepwise, triton_gates

KERNELS = {"host": cuda, "triton": triton_gates, "cuda": cuda}
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}
CASES = [(backend, dtype) for backend in KERNELS for dtype in DTYPES if (backend, dtype) != ("triton", "fp64")]
HIDDEN = [1, 7, 33, 64, 100, 257]
DIRECTIONS, FIRST, PREVIOUS_FIRST = 2, 5, 1


def kernel_of(backend: str) -> tuple[ModuleType, str]:
    """The module that binds the kernel, and the device it runs on here."""
    module = KERNELS[backend]
    missing = module.unavailable()
    if backend != "host" and missing is not None:
        pytest.skip(f"{backend}: {missing}")
    return module, "cuda" if backend != "host" and torch.cuda.is_available() else "cpu"


def acc_of(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def place(values: Tensor, device: str, dtype: torch.dtype, aligned: bool = True) -> Tensor:
    """A contiguous copy that starts on a 16-byte boundary, or one element past it."""
    offset = 0 if aligned else 1
    flat = torch.empty(values.numel() + offset, device=device, dtype=dtype)[offset:]
    assert (flat.data_ptr() % 16 == 0) == aligned
    return flat.copy_(values.flatten()).view(values.shape)


def nan(*shape: int) -> Tensor:
    return torch.full(shape, float("nan"))


def run_forward(backend: str, a: Tensor, product: Tensor, c: Tensor, dtype: torch.dtype, aligned=True, save=True):
    """One step of direction 1 whose pre-activations are a + product [rows, 4H], from c [rows, H]."""
    module, device = kernel_of(backend)
    (rows, hidden), acc = c.shape, acc_of(dtype)
    batch, all_rows = rows + 2, FIRST + rows + 3
    gates, state = nan(DIRECTIONS, all_rows, 4 * hidden), nan(DIRECTIONS, batch, hidden)
    gates[1, FIRST : FIRST + rows] = a
    state[1, :rows] = c
    out = {
        "gates": place(gates, device, dtype, aligned),
        "product": place(torch.cat([product, nan(2, 4 * hidden)]), device, acc, aligned),
        "c": place(state, device, acc, aligned),
        "h": place(nan(DIRECTIONS, batch, hidden), device, dtype, aligned),
        "y": place(nan(all_rows, DIRECTIONS * hidden), device, dtype, aligned),
        "cells": place(nan(DIRECTIONS, all_rows, hidden), device, acc, aligned) if save else None,
    }
    module.bind_forward(*out.values())(1, FIRST, rows)
    step = slice(FIRST, FIRST + rows)
    found = {"c": out["c"][1, :rows], "h": out["h"][1, :rows], "y": out["y"][step, hidden:]}
    found["gates"] = out["gates"][1, step]
    if save:
        found["cells"] = out["cells"][1, step]
    found = {name: t.clone() for name, t in found.items()}
    out["y"][step, hidden:] = float("nan")
    for name, rows_of in (("c", slice(rows)), ("h", slice(rows)), ("gates", step), ("cells", step)):
        if out[name] is not None:
            out[name][1, rows_of] = float("nan")
    assert all(out[name].isnan().all() for name in ("c", "h", "y", "gates")), "rows of other steps were written"
    assert out["cells"] is None or out["cells"].isnan().all(), "cells of other steps were written"
    return {name: t.cpu() for name, t in found.items()}


def exact_forward(a: Tensor, c: Tensor) -> dict[str, Tensor]:
    """The cell in fp64 by torch's own functions."""
    i, f, g, o = a.double().chunk(4, dim=1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c = f * c.double() + i * g
    h = o * c.tanh()
    return {"gates": torch.cat([i, f, g, o], 1), "c": c, "cells": c, "h": h, "y": h}


def check(found: dict[str, Tensor], exact: dict[str, Tensor], dtype: torch.dtype) -> None:
    """One rounding of what is stored, and a few of the arithmetic."""
    slack = 16 * torch.finfo(acc_of(dtype)).eps
    for name, got in found.items():
        torch.testing.assert_close(
            got.double(),
            exact[name],
            rtol=torch.finfo(got.dtype).eps,
            atol=slack,
            equal_nan=True,
            msg=lambda m, name=name: f"{name}: {m}",
        )


def forward_inputs(rows: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(hidden * 100 + rows)
    a, product, c = torch.randn(rows, 4 * hidden), torch.randn(rows, 4 * hidden), torch.randn(rows, hidden)
    return a.to(dtype).float(), product, c


@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("backend, dtype", CASES)
def test_forward(backend, dtype, hidden, rows):
    dtype = DTYPES[dtype]
    a, product, c = forward_inputs(rows, hidden, dtype)
    found = run_forward(backend, a, product, c, dtype)
    check(found, exact_forward(a.double() + product.double(), c), dtype)


@pytest.mark.parametrize("hidden", [33, 64])
@pytest.mark.parametrize("backend, dtype", CASES)
def test_forward_is_the_same_unaligned_and_without_saving(backend, dtype, hidden):
    dtype = DTYPES[dtype]
    a, product, c = forward_inputs(3, hidden, dtype)
    found = run_forward(backend, a, product, c, dtype)
    unaligned = run_forward(backend, a, product, c, dtype, aligned=False)
    inference = run_forward(backend, a, product, c, dtype, save=False)
    assert all(torch.equal(found[name], unaligned[name]) for name in found)
    assert all(torch.equal(found[name], inference[name]) for name in ("c", "h", "y"))


def run_backward(backend, gates, cells, c_prev, known, dy, dh, dc, dtype, aligned=True):
    """One step of direction 1; c' [rows, H] comes from the previous step for ``known`` sequences, else from c0."""
    module, device = kernel_of(backend)
    (rows, hidden), acc = cells.shape, acc_of(dtype)
    batch, all_rows, step = rows + 2, FIRST + rows + 3, slice(FIRST, FIRST + rows)
    assert PREVIOUS_FIRST + known <= FIRST

    def over_rows(values: Tensor) -> Tensor:
        padded = nan(DIRECTIONS, all_rows, values.size(1)).double()
        padded[1, step] = values
        return padded

    def over_batch(values: Tensor) -> Tensor:
        padded = nan(DIRECTIONS, batch, hidden).double()
        padded[1, :rows] = values
        return padded

    cells, c0 = over_rows(cells), over_batch(c_prev)
    cells[1, PREVIOUS_FIRST : PREVIOUS_FIRST + known] = c_prev[:known]
    c0[1, :known] = float("nan")
    if dy is not None:
        dy = place(torch.cat([nan(all_rows, hidden), over_rows(dy)[1]], 1), device, dtype, aligned)
    dc_state = place(over_batch(dc), device, acc, aligned)
    dgates = place(nan(DIRECTIONS, all_rows, 4 * hidden), device, dtype, aligned)
    tensors = (
        place(over_rows(gates), device, dtype, aligned),
        place(cells, device, acc, aligned),
        place(c0, device, dtype, aligned),
        dy,
        place(over_batch(dh), device, acc, aligned),
        dc_state,
        dgates,
    )
    module.bind_backward(*tensors)(1, FIRST, rows, PREVIOUS_FIRST, known)
    found = {"dgates": dgates[1, step].clone().cpu(), "dc": dc_state[1, :rows].clone().cpu()}
    dgates[1, step], dc_state[1, :rows] = float("nan"), float("nan")
    assert dgates.isnan().all() and dc_state.isnan().all(), "rows of other steps were written"
    return found


def backward_inputs(rows: int, hidden: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Gates that are exact in the dtype, c that follows from them, and gradients; all fp64."""
    torch.manual_seed(hidden * 100 + rows)
    gates = (0.05 + 0.9 * torch.rand(rows, 4 * hidden)).to(dtype).double()
    gates[:, 2 * hidden : 3 * hidden] = (gates[:, 2 * hidden : 3 * hidden] * 2 - 1).to(dtype).double()
    c_prev, dy = (torch.randn(rows, hidden).to(dtype).double() for _ in range(2))
    dh, dc = (torch.randn(rows, hidden).double() for _ in range(2))
    i, f, g, _ = gates.chunk(4, 1)
    return {"gates": gates, "cells": f * c_prev + i * g, "c_prev": c_prev, "dy": dy, "dh": dh, "dc": dc}


def exact_backward(gates, cells, c_prev, dy, dh, dc) -> dict[str, Tensor]:
    """Autograd in fp64, from the pre-activations that give these gates."""
    i, f, g, o = gates.chunk(4, 1)
    a = torch.cat([i.logit(), f.logit(), g.atanh(), o.logit()], 1).requires_grad_()
    c_prev = c_prev.clone().requires_grad_()
    i, f, g, o = a.chunk(4, 1)
    c = f.sigmoid() * c_prev + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    torch.testing.assert_close(c.detach(), cells)
    dgates, dc = torch.autograd.grad((h, c), (a, c_prev), (dh if dy is None else dh + dy, dc))
    return {"dgates": dgates, "dc": dc}


@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("backend, dtype", CASES)
def test_backward(backend, dtype, hidden, rows):
    dtype = DTYPES[dtype]
    inputs = backward_inputs(rows, hidden, dtype)
    check(run_backward(backend, **inputs, known=min(rows, 2), dtype=dtype), exact_backward(**inputs), dtype)
    inputs["dy"] = None
    check(run_backward(backend, **inputs, known=0, dtype=dtype), exact_backward(**inputs), dtype)


@pytest.mark.parametrize("hidden", [33, 64])
@pytest.mark.parametrize("backend, dtype", CASES)
def test_backward_is_the_same_unaligned(backend, dtype, hidden):
    inputs = backward_inputs(3, hidden, DTYPES[dtype])
    found, unaligned = (
        run_backward(backend, **inputs, known=2, dtype=DTYPES[dtype], aligned=aligned) for aligned in (True, False)
    )
    assert all(torch.equal(found[name], unaligned[name]) for name in found)


@pytest.mark.parametrize("large", [1e3, float("inf")])
@pytest.mark.parametrize("backend, dtype", CASES)
def test_saturated_gates_are_exact(backend, dtype, large):
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 4)  # [16, i f g o]
    c = torch.full((16, 1), 3.0)
    found = run_forward(backend, large * signs, torch.zeros(16, 4), c, DTYPES[dtype])
    i, f, o = ((signs[:, k] + 1) / 2 for k in (0, 1, 3))
    g = signs[:, 2]
    assert torch.equal(found["gates"].float(), torch.stack([i, f, g, o], 1))
    assert torch.equal(found["cells"].float(), (f * 3 + i * g)[:, None])
    backward = run_backward(
        backend,
        found["gates"].double(),
        found["cells"].double(),
        c.double(),
        0,
        None,
        c.double(),
        c.double(),
        DTYPES[dtype],
    )
    assert torch.equal(backward["dgates"].float(), torch.zeros(16, 4))


@pytest.mark.parametrize("backend, dtype", CASES)
def test_activations_are_accurate_over_their_range(backend, dtype):
    """With c' = 0 the gates of a column of x are sigmoid(x) and tanh(x) themselves."""
    dtype = DTYPES[dtype]
    x = torch.cat([torch.logspace(-30, 0, 400), torch.linspace(0.5, 80, 1600)])
    x = torch.cat([-x, x]).to(dtype).float()
    rows = x.numel() // 250
    column = x.view(rows, 250)
    found = run_forward(backend, column.repeat(1, 4), torch.zeros(rows, 1000), torch.zeros(rows, 250), dtype)["gates"]
    exact = exact_forward(column.repeat(1, 4), torch.zeros(rows, 250))["gates"]
    # e^x of a rounded x log2(e) is off by |x| roundings
    allowed = torch.finfo(dtype).eps + (4 + column.repeat(1, 4).abs()) * torch.finfo(acc_of(dtype)).eps
    smallest = torch.finfo(dtype).tiny  # below it numbers have fewer digits
    error = (found.double() - exact).abs() / exact.abs().clamp(min=smallest)
    assert (error <= allowed).all(), f"relative error {error.max():.2e}"


@pytest.mark.parametrize("backend, dtype", CASES)
def test_nan_stays_in_its_unit(backend, dtype):
    dtype = DTYPES[dtype]
    for hidden in (7, 64):
        a, product, c = forward_inputs(3, hidden, dtype)
        clean = run_forward(backend, a, product, c, dtype)
        for gate in range(4):
            spoilt = a.clone()
            spoilt[1, gate * hidden + 2] = float("nan")
            found = run_forward(backend, spoilt, product, c, dtype)
            assert found["gates"][1, gate * hidden + 2].isnan()
            assert found["y"][1, 2].isnan() and found["h"][1, 2].isnan()
            assert found["c"][1, 2].isnan() == (gate != 3)
            for name in ("c", "h", "y"):
                found[name][1, 2] = clean[name][1, 2]
                assert torch.equal(found[name], clean[name])
        inputs = backward_inputs(3, hidden, dtype)
        clean = run_backward(backend, **inputs, known=2, dtype=dtype)
        inputs["dh"][1, 2] = float("nan")
        found = run_backward(backend, **inputs, known=2, dtype=dtype)
        assert found["dgates"][1, 2::hidden].isnan().all() and found["dc"][1, 2].isnan()
        found["dgates"][1, 2::hidden], found["dc"][1, 2] = clean["dgates"][1, 2::hidden], clean["dc"][1, 2]
        assert torch.equal(found["dgates"], clean["dgates"]) and torch.equal(found["dc"], clean["dc"])


# ---- The recurrence ------------------------------------------------------------------------------------------------

STEPS = {"T1": [3], "T2": [17, 17], "T25": [2] * 25, "packed": [5, 5, 3, 2, 2, 1], "T3": [17] * 3}
RECURRENCES = [("T1", 257), ("T2", 33), ("T25", 7), ("packed", 100), ("packed", 32), ("T3", 1)]


def run_stepwise(module: ModuleType, device: str, layer: nn.LSTM, x, h0, c0, steps, dy, dh, dc) -> dict[str, Tensor]:
    """Outputs and gradients of the recurrence; what it writes is NaN beforehand."""
    dtype, (directions, _, hidden), rows = x.dtype, c0.shape, x.size(0)
    weights = [[w.detach() for w in layer.all_weights[d]] for d in range(directions)]
    product = torch.stack([torch.addmm(b_ih + b_hh, x, w_ih.t()) for w_ih, _, b_ih, b_hh in weights])
    w_hh = [w[1].to(device) for w in weights]

    def fresh(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return place(nan(*shape), device, dtype)

    gates, h0, c0 = product.to(device), h0.to(device), c0.to(device)
    y, h_n, c_n = fresh(rows, directions * hidden), fresh(*c0.shape), fresh(*c0.shape)
    cells = fresh(directions, rows, hidden, dtype=acc_of(dtype))
    stepwise.recurrence_forward(module.bind_forward, gates, h0, c0, w_hh, steps, y, h_n, c_n, cells)
    grads = [t.to(device) for t in (dy, dh, dc)]
    dgates, dh_0, dc_0 = fresh(directions, rows, 4 * hidden), fresh(*c0.shape), fresh(*c0.shape)
    read = [gates, cells, c0, *grads]
    before = [t.clone() for t in read]
    stepwise.recurrence_backward(module.bind_backward, gates, cells, c0, w_hh, steps, *grads, dgates, dh_0, dc_0)
    assert all(torch.equal(a, b) for a, b in zip(before, read, strict=True))
    dx = sum(dgates[d].cpu().double() @ weights[d][0].double() for d in range(directions))
    found = {"y": y, "h_n": h_n, "c_n": c_n, "dh_0": dh_0, "dc_0": dc_0, "dx": dx}
    return {name: t.cpu().double() for name, t in found.items()}


def run_torch(layer: nn.LSTM, x, h0, c0, steps, *upstream: Tensor) -> dict[str, Tensor]:
    x, h0, c0 = (t.clone().requires_grad_() for t in (x, h0, c0))
    y, (h_n, c_n) = layer(PackedSequence(x, torch.tensor(steps)), (h0, c0))
    dh, dc, dx = torch.autograd.grad((y.data, h_n, c_n), (h0, c0, x), upstream)
    found = {"y": y.data, "h_n": h_n, "c_n": c_n, "dh_0": dh, "dc_0": dc, "dx": dx}
    return {name: t.detach().double() for name, t in found.items()}


@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("steps, hidden", RECURRENCES, ids=[f"{name}-H{h}" for name, h in RECURRENCES])
@pytest.mark.parametrize("backend, dtype", CASES)
def test_recurrence(backend, dtype, steps, hidden, bidirectional):
    """The error, ||a - fp64|| / ||fp64||, is at most twice torch.nn.LSTM's plus one rounding of the result."""
    module, device = kernel_of(backend)
    dtype, steps, directions = DTYPES[dtype], STEPS[steps], 1 + bidirectional
    torch.manual_seed(hidden)
    layer = nn.LSTM(3, hidden, bidirectional=bidirectional).to(dtype)
    shapes = {"x": (sum(steps), 3), "h0": (directions, steps[0], hidden), "c0": (directions, steps[0], hidden)}
    shapes |= {"dy": (sum(steps), directions * hidden), "dh": shapes["h0"], "dc": shapes["h0"]}
    x, h0, c0, *upstream = (torch.randn(shape).to(dtype) for shape in shapes.values())
    ours = run_stepwise(module, device, layer, x, h0, c0, steps, *upstream)
    theirs = run_torch(layer, x, h0, c0, steps, *upstream)
    exact = run_torch(layer.double(), x.double(), h0.double(), c0.double(), steps, *(t.double() for t in upstream))
    for name, want in exact.items():
        error, reference = ((t[name] - want).norm() / want.norm() for t in (ours, theirs))
        bound = 2 * reference + (1e-14 if dtype == torch.float64 else torch.finfo(dtype).eps)
        assert error <= bound, f"{name}: relative error {error:.2e}, torch.nn.LSTM's {reference:.2e}"


# ---- What is missing -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_launch_that_fails_says_so():
    step = cuda._C.gates_forward(
        gates=0, product=0, c=0, h=0, y=0, cells=0, sizes=(1, 1, 1, 1), dtype=0, device=0, stream=0
    )
    with pytest.raises(RuntimeError, match="CUDA"):
        step(0, 0, 1)


@pytest.mark.parametrize(
    "built, version, gpu, words",
    [
        (False, "13.0", True, "without CUDA"),
        (True, None, True, "has no CUDA"),
        (True, "13.0", False, "no NVIDIA GPU or driver"),
        (True, "13.0", True, None),
    ],
)
def test_cuda_says_what_is_missing(monkeypatch, built, version, gpu, words):
    monkeypatch.setattr(cuda, "_C", type("Extension", (), {"build_info": staticmethod(lambda: {"cuda": built})}))
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    found = cuda.unavailable.__wrapped__()
    assert found is None if words is None else words in found


def test_cuda_refuses_what_it_does_not_serve():
    assert "not on cpu" in cuda.refuses(torch.device("cpu"), torch.float32, 8)
    assert "not complex64" in cuda.refuses(torch.device("cuda"), torch.complex64, 8)


def test_triton_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "TRITON_INTERPRET" in triton_gates.unavailable.__wrapped__()
    assert "not on cpu" in triton_gates.refuses(torch.device("cpu"), torch.float32, 8)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "not on cuda" in triton_gates.refuses(torch.device("cuda"), torch.float32, 8)
    assert "not float64" in triton_gates.refuses(torch.device("cpu"), torch.float64, 8)
    monkeypatch.setitem(sys.modules, "lstm_fast.kernels.triton_kernels", None)
    monkeypatch.setattr(triton_gates, "_kernels", triton_gates._kernels.__wrapped__)
    assert "triton can't be loaded" in triton_gates.unavailable.__wrapped__()
