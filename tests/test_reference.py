"""The reference against torch.nn.LSTM in fp64, against numerical gradients, and against arithmetic done by hand."""

import math
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lstm_fast
from lstm_fast import reference

FEATURES, H, B = 4, 5, 3
EVERY = (True,) * 5  # gradient
STEPS = {"dense": [B] * 6, "one step": [B], "packed": [3, 3, 2, 1, 1], "packed to one": [3, 1]}


def _reversed_in_time(x: Tensor, steps: list[int]) -> Tensor:
    """Rows of each sequence in the opposite order of time, so that a forward walk over them is a reverse one."""
    out = x.clone()
    starts = [sum(steps[:t]) for t in range(len(steps))]
    for b in range(steps[0]):
        rows = [start + b for start, n in zip(starts, steps, strict=True) if b < n]
        out[rows] = x[rows[::-1]]
    return out


def _oracle(module: nn.LSTM, x: Tensor, h0: Tensor, c0: Tensor, steps: list[int], reverse: bool) -> tuple[Tensor, ...]:
    """torch.nn.LSTM over the same rows; the reverse direction by turning time round."""
    data = _reversed_in_time(x, steps) if reverse else x
    packed = nn.utils.rnn.PackedSequence(data, torch.tensor(steps))
    y, (h_n, c_n) = module(packed, (h0[None], c0[None]))
    return _reversed_in_time(y.data, steps) if reverse else y.data, h_n[0], c_n[0]


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("proj", [0, 2])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS.keys())
def test_forward_and_hand_written_backward_agree_with_torch(steps, bias, proj, reverse):
    torch.manual_seed(0)
    module = nn.LSTM(FEATURES, H, bias=bias, proj_size=proj, dtype=torch.float64)
    x = torch.randn(sum(steps), FEATURES, dtype=torch.float64, requires_grad=True)
    h0 = torch.randn(B, proj or H, dtype=torch.float64, requires_grad=True)
    c0 = torch.randn(B, H, dtype=torch.float64, requires_grad=True)
    expected = _oracle(module, x, h0, c0, steps, reverse)
    upstream = [torch.randn_like(t) for t in expected]
    inputs = {"x": x, "h0": h0, "c0": c0, "w_ih": module.weight_ih_l0, "w_hh": module.weight_hh_l0}
    if bias:
        inputs["b"] = module.bias_ih_l0
    if proj:
        inputs["w_hr"] = module.weight_hr_l0
    wanted = torch.autograd.grad(expected, list(inputs.values()), upstream)

    biases = (module.bias_ih_l0, module.bias_hh_l0) if bias else (None, None)
    w_hr = module.weight_hr_l0 if proj else None
    with torch.no_grad():
        of_steps, h_n, c_n = reference.layer(
            x, h0, c0, module.weight_ih_l0, module.weight_hh_l0, *biases, w_hr, steps, reverse
        )
        found = reference.layer_backward(
            *(*upstream, x, h0, c0, module.weight_ih_l0, module.weight_hh_l0, w_hr, of_steps, steps, reverse), EVERY
        )
    for name, got, want in zip(("y", "h_n", "c_n"), (torch.cat(of_steps[0]), h_n, c_n), expected, strict=True):
        torch.testing.assert_close(got, want.detach(), rtol=0, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
    for name, want in zip(inputs, wanted, strict=True):
        got = getattr(found, name)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12, msg=lambda m, name=name: f"d{name}: {m}")


@pytest.mark.parametrize("missing", [0, 1, 2], ids=["dy", "dh_n", "dc_n"])
def test_a_gradient_of_none_is_zero(missing):
    torch.manual_seed(0)
    weights = (torch.randn(4 * H, FEATURES), torch.randn(4 * H, H))
    x, h0, c0 = torch.randn(2 * B, FEATURES), torch.randn(B, H), torch.randn(B, H)
    of_steps, h_n, c_n = reference.layer(x, h0, c0, *weights, None, None, None, [B, B], False)
    upstream = [torch.randn(2 * B, H), torch.randn_like(h_n), torch.randn_like(c_n)]
    upstream[missing] = torch.zeros_like(upstream[missing])
    saved = (x, h0, c0, *weights, None, of_steps, [B, B], False, EVERY)
    with_zeros = reference.layer_backward(*upstream, *saved)
    upstream[missing] = None
    with_none = reference.layer_backward(*upstream, *saved)
    for a, b in zip(with_zeros, with_none, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("proj", [0, 2])
def test_hand_written_backward_agrees_with_numerical_gradients(proj):
    torch.manual_seed(0)
    module = lstm_fast.LSTM(2, 3, bidirectional=True, proj_size=proj, dtype=torch.float64, backend="reference")
    names = [name for name, _ in module.named_parameters()]

    def run(x, h0, c0, *weights):
        y, states = torch.func.functional_call(module, dict(zip(names, weights, strict=True)), (x, (h0, c0)))
        return y, *states

    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    h0 = torch.randn(2, 2, proj or 3, dtype=torch.float64, requires_grad=True)
    c0 = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    weights = [p.detach().clone().requires_grad_() for p in module.parameters()]
    assert torch.autograd.gradcheck(run, (x, h0, c0, *weights))
    assert torch.autograd.gradgradcheck(run, (x, h0, c0, *weights), fast_mode=True)


def test_gate_order_is_i_f_g_o_by_hand():
    """One cell, no input, four different biases: F1-F6 with Python's own arithmetic."""
    biases = {"i": 0.3, "f": -0.7, "g": 1.1, "o": 0.5}
    c0 = 0.9
    sigmoid = {k: 1 / (1 + math.exp(-v)) for k, v in biases.items()}
    c = sigmoid["f"] * c0 + sigmoid["i"] * math.tanh(biases["g"])
    h = sigmoid["o"] * math.tanh(c)
    bias = torch.tensor([biases[k] for k in "ifgo"], dtype=torch.float64)
    zero = torch.zeros(4, 1, dtype=torch.float64)
    state = torch.zeros(1, 1, dtype=torch.float64)
    (y, _, _), _, c_n = reference.layer(state, state, state + c0, zero, zero, bias, None, None, [1], False)
    assert y[0].item() == pytest.approx(h, abs=1e-15)
    assert c_n.item() == pytest.approx(c, abs=1e-15)


def test_previous_takes_each_sequences_own_step():
    steps = [3, 2, 1]
    value, initial = torch.arange(6.0)[:, None], -torch.arange(1.0, 4.0)[:, None]
    forward = reference.previous(value, initial, steps, reverse=False).flatten().tolist()
    backward = reference.previous(value, initial, steps, reverse=True).flatten().tolist()
    assert forward == [-1, -2, -3, 0, 1, 3]
    assert backward == [3, 4, -3, 5, -2, -1]


class _Elements(TorchDispatchMode):
    """Counts those of all results, and calls of each operator."""

    def __init__(self):
        super().__init__()
        self.count, self.calls = 0, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls[func.overloadpacket.__name__] += 1
        self.count += sum(t.numel() for t in tree_leaves(result) if isinstance(t, Tensor))
        return result


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_work_of_a_double_backward_grows_with_the_steps(packed, reverse):
    """Not with their square, as it would if the gradient of each step's rows were as large as that of all rows."""

    def elements(steps):
        torch.manual_seed(0)
        rows = [torch.randn(sum(steps), FEATURES), torch.randn(B, H), torch.randn(B, H)]
        x, h0, c0, w_ih, w_hh = (
            t.requires_grad_() for t in (*rows, torch.randn(4 * H, FEATURES), torch.randn(4 * H, H))
        )
        of_steps, h_n, c_n = reference.layer(x, h0, c0, w_ih, w_hh, None, None, None, steps, reverse)
        dy = torch.ones(sum(steps), H)
        found = reference.layer_backward(dy, h_n, c_n, x, h0, c0, w_ih, w_hh, None, of_steps, steps, reverse, EVERY)
        with _Elements() as counted:
            torch.autograd.grad(found.x.sum() + found.w_hh.sum(), (x, h0, c0, w_ih, w_hh))
        return counted.count

    last = [B - 1] * packed
    few, many, more = (elements([B] * count + last) for count in (10, 20, 40))
    assert more - many == pytest.approx(2 * (many - few), rel=0.05)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_a_dense_step_copies_no_state_and_slices_nothing(reverse):
    steps = [B] * 6
    weights = (torch.randn(4 * H, FEATURES), torch.randn(4 * H, H))
    x, h0, c0 = torch.randn(sum(steps), FEATURES), torch.randn(B, H), torch.randn(B, H)
    with _Elements() as forward:
        of_steps, h_n, c_n = reference.layer(x, h0, c0, *weights, None, None, None, steps, reverse)
    with _Elements() as backward:
        reference.layer_backward(None, h_n, c_n, x, h0, c0, *weights, None, of_steps, steps, reverse, EVERY)
    assert forward.calls["cat"] == forward.calls["slice"] == backward.calls["slice"] == 0
    assert backward.calls["cat"] == len(steps) + 2  # da of each step, of all, and h'


@pytest.mark.parametrize("index", range(len(EVERY)), ids=["x", "w_ih", "w_hh", "b", "w_hr"])
def test_a_gradient_alone_is_what_it_is_among_all_and_the_others_cost_nothing(index):
    torch.manual_seed(0)
    features, steps = 2, [B, B]
    weights = (torch.randn(4 * H, FEATURES), torch.randn(4 * H, features))
    w_hr = torch.randn(features, H)
    x, h0, c0 = torch.randn(2 * B, FEATURES), torch.randn(B, features), torch.randn(B, H)
    of_steps, h_n, c_n = reference.layer(x, h0, c0, *weights, None, None, w_hr, steps, False)
    arguments = (None, h_n, c_n, x, h0, c0, *weights, w_hr, of_steps, steps, False)
    found, calls = [], []
    for needs in (EVERY, (False,) * 5, tuple(k == index for k in range(5))):
        with _Elements() as counted:
            dx, _, _, *of_weights = reference.layer_backward(*arguments, needs)
        found.append([dx, *of_weights])
        calls.append(counted.calls["mm"] + counted.calls["sum"])
    everything, nothing, alone = found
    assert [g is not None for g in alone] == [k == index for k in range(5)]
    assert all(g is None for g in nothing) and torch.equal(alone[index], everything[index])
    assert (calls[0] - calls[1], calls[2] - calls[1]) == (5, 1)
