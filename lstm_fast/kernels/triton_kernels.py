"""The gate kernel in Triton, imported when first used: triton is optional, and takes a while to import.

N rows over all steps, B sequences, H hidden units, D directions, T the storage dtype (fp32, bf16 or fp16); all maths in
fp32. Program (b, j) takes units j * BLOCK .. of the step's sequence b, which is row first + b of the arrays over N.
All tensors are contiguous; Triton specialises on their 16-byte alignment and on H being a multiple of 16.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x) through e^-|x|: exactly 0 and 1 at the ends without overflow; NaN stays NaN."""
    t = tl.exp(-tl.abs(x))
    return tl.where(x < 0, t, 1.0) / (1.0 + t)


@triton.jit
def tanh(x):
    """Near 0 x + x^3 q(x^2), q a Chebyshev fit within one ulp, else 1 - 2 e^-2|x| / (1 + e^-2|x|), which ends at 1."""
    small = tl.abs(x) < 0.625
    u = tl.where(small, x, 0.0)
    z = u * u
    q = -0.006104947999119759
    q = q * z + 0.021003641188144684
    q = q * z - 0.05385249853134155
    q = q * z + 0.13332782685756683
    q = q * z - 0.333333283662796
    t = tl.exp(-2.0 * tl.abs(x))
    far = 1.0 - 2.0 * t / (1.0 + t)
    return tl.where(small, u + u * (z * q), tl.where(x < 0, -far, far))


@triton.jit(do_not_specialize=["all_rows", "batch", "directions", "direction", "first"])
def forward(
    gates,  # T [D, N, 4H], on entry x W_ih^T + b_ih + b_hh; with cells in place activated, else only read
    product,  # fp32 [B, 4H], h' W_hh^T of this step
    c_state,  # fp32 [D, B, H], in place
    h_state,  # T [D, B, H], written
    y,  # T [N, D * H], written: h again
    cells,  # fp32 [D, N, H], written: c again; None when there will be no backward pass
    all_rows,
    batch,
    hidden,
    directions,
    direction,
    first,
    BLOCK: tl.constexpr,
):
    """F1 i = sigmoid(a_i)  F2 f = sigmoid(a_f)  F3 g = tanh(a_g)  F4 o = sigmoid(a_o)  F5 c = f c' + i g
    F6 h = o tanh(c), with a = gates + product."""
    b = tl.program_id(0).to(tl.int64)
    unit = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = unit < hidden
    row = b + first
    saved = row + direction * all_rows.to(tl.int64)
    state = (b + direction * batch) * hidden + unit
    gates += saved * 4 * hidden + unit
    product += b * 4 * hidden + unit

    a_i = tl.load(gates, inside).to(tl.float32) + tl.load(product, inside)
    a_f = tl.load(gates + hidden, inside).to(tl.float32) + tl.load(product + hidden, inside)
    a_g = tl.load(gates + 2 * hidden, inside).to(tl.float32) + tl.load(product + 2 * hidden, inside)
    a_o = tl.load(gates + 3 * hidden, inside).to(tl.float32) + tl.load(product + 3 * hidden, inside)
    i, f, g, o = sigmoid(a_i), sigmoid(a_f), tanh(a_g), sigmoid(a_o)
    c = f * tl.load(c_state + state, inside) + i * g
    h = o * tanh(c)

    tl.store(c_state + state, c, inside)
    tl.store(h_state + state, h, inside)
    tl.store(y + (row * directions + direction) * hidden + unit, h, inside)
    if cells is not None:
        tl.store(cells + saved * hidden + unit, c, inside)
        tl.store(gates, i, inside)
        tl.store(gates + hidden, f, inside)
        tl.store(gates + 2 * hidden, g, inside)
        tl.store(gates + 3 * hidden, o, inside)


@triton.jit(
    do_not_specialize=["all_rows", "batch", "directions", "direction", "first", "previous_first", "previous_rows"]
)
def backward(
    gates,  # T [D, N, 4H], activated
    cells,  # fp32 [D, N, H]
    c0,  # T [D, B, H]
    dy,  # T [N, D * H], None when zero
    dh_state,  # fp32 [D, B, H], gradient of h without dy
    dc_state,  # fp32 [D, B, H], in place: gradient of c on entry, of c' on return
    dgates,  # T [D, N, 4H], written
    all_rows,
    batch,
    hidden,
    directions,
    direction,
    first,
    previous_first,
    previous_rows,
    BLOCK: tl.constexpr,
):
    """B1 da_o = dh tanh(c) o (1 - o)  B2 dc = dc + dh o (1 - tanh(c)^2)  B3 da_i = dc g i (1 - i)
    B4 da_f = dc c' f (1 - f)  B5 da_g = dc i (1 - g^2)  B6 dc' = dc f.

    c' of sequences below previous_rows is in cells, at the step whose first row is previous_first; the others start
    at this step, from c0.
    """
    b = tl.program_id(0).to(tl.int64)
    unit = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = unit < hidden
    row = b + first
    before = direction * all_rows.to(tl.int64)
    saved = row + before
    state = (b + direction * batch) * hidden + unit
    gates += saved * 4 * hidden + unit
    dgates += saved * 4 * hidden + unit

    i = tl.load(gates, inside).to(tl.float32)
    f = tl.load(gates + hidden, inside).to(tl.float32)
    g = tl.load(gates + 2 * hidden, inside).to(tl.float32)
    o = tl.load(gates + 3 * hidden, inside).to(tl.float32)
    c = tl.load(cells + saved * hidden + unit, inside)
    if b < previous_rows:
        c_prev = tl.load(cells + (before + previous_first + b) * hidden + unit, inside)
    else:
        c_prev = tl.load(c0 + state, inside).to(tl.float32)
    dh = tl.load(dh_state + state, inside)
    if dy is not None:
        dh += tl.load(dy + (row * directions + direction) * hidden + unit, inside).to(tl.float32)

    tanh_c = tanh(c)
    da_o = dh * tanh_c * o * (1.0 - o)
    dc = tl.load(dc_state + state, inside) + dh * o * (1.0 - tanh_c * tanh_c)
    da_i = dc * g * i * (1.0 - i)
    da_f = dc * c_prev * f * (1.0 - f)
    da_g = dc * i * (1.0 - g * g)

    tl.store(dc_state + state, dc * f, inside)
    tl.store(dgates, da_i, inside)
    tl.store(dgates + hidden, da_f, inside)
    tl.store(dgates + 2 * hidden, da_g, inside)
    tl.store(dgates + 3 * hidden, da_o, inside)
