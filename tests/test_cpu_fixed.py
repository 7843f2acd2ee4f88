"""W_hh in fixed point of 24 bits (csrc/cpu/fixed.h), which AVX-512 takes for large weights and few rows a step.

It is as exact as floats, whatever the weights, and does not show where numbers are beyond it.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from lstm_fast import _C, LSTM
from tests.cpu_case import WEIGHTS, case, check_usual_errors, limit_to, results, three

HIDDEN, STEPS = 352, 48  # of the sizes that go in fixed point, with a piece of k that isn't whole


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Of more, each has less of the weight, which then stays in its cache as floats."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(
    ("batch", "sizes"),
    [(1, {}), (6, {}), (3, {"bidirectional": True}), (2, {"proj_size": 330})],
    ids=["one sequence", "six", "both directions", "projected"],
)
def test_errors_are_within_twice_those_of_torch(batch: int, sizes: dict[str, Any], weights: str) -> None:
    modules = three(40, HIDDEN, WEIGHTS[weights], **sizes)
    check_usual_errors(modules, weights, batch, STEPS)


@pytest.mark.parametrize("where", ["h0", "dy", "weight"])
def test_magnitudes_beyond_fixed_point_are_those_of_floats(where: str) -> None:
    """Sums of integers leave the range of floats before those of floats do: such a call is computed anew."""
    ours, _, oracle = three(40, HIDDEN, lambda w: w)
    x, states, dy = case(ours, 1, STEPS)
    if where == "h0":
        states[0] *= 1e34
    elif where == "dy":
        dy *= 1e33
    else:
        with torch.no_grad():
            ours.weight_hh_l0 *= 1e34
            oracle.load_state_dict(ours.state_dict())
    for a, right in zip(results(ours, x, states, dy), results(oracle, x, states, dy.double()), strict=True):
        finite = right.abs() < 1e38
        assert torch.equal(a.isfinite(), finite)
        assert (a.double() - right)[finite].norm() <= 1e-4 * right[finite].norm()


def test_what_a_call_was_unfit_for_is_forgotten_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any instruction set: else that would be computed anew for ever."""
    ours, _, _ = three(40, HIDDEN, lambda w: w)
    half, oracle = LSTM(6, 20, dtype=torch.float16, backend="cpu"), nn.LSTM(6, 20).double()
    oracle.load_state_dict(half.state_dict())
    x, small = torch.randn(STEPS, 1, 40), torch.randn(9, 5, 6).half()
    for name in _C.CPU_INSTRUCTION_SETS:
        with torch.no_grad():
            ours(x, (torch.full((1, 1, HIDDEN), 1e34), torch.zeros(1, 1, HIDDEN)))  # beyond fixed point
            with monkeypatch.context() as patch:
                limit_to(name, patch)
                y, _ = half(small)
            assert (y.double() - oracle(small.double())[0]).abs().max() < 1e-2


def test_what_is_not_finite_stays_where_it_is() -> None:
    ours, _, _ = three(40, HIDDEN, lambda w: w)
    x = torch.randn(STEPS, 3, 40)
    x[4, 1, 0] = float("nan")
    with torch.no_grad():
        y, _ = ours(x)
        ours.weight_hh_l0[0, 0] = float("nan")  # of the first unit's input gate
        other, _ = ours(x[:, :1])
    assert y[4:, 1].isnan().all()
    assert y[:4].isfinite().all()
    assert y[:, [0, 2]].isfinite().all()
    assert other[1, 0, 0].isnan()


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_number_of_threads_gives_the_same_bits(threads: int) -> None:
    """Both directions of a weight so large that two threads have it in fixed point too."""
    torch.manual_seed(0)
    ours, x = LSTM(40, 420, bidirectional=True, backend="cpu"), torch.randn(STEPS, 2, 40)
    one = [*(t.detach() for t in ours(x)[:1]), *torch.autograd.grad(ours(x)[0].sin().sum(), list(ours.parameters()))]
    torch.set_num_threads(threads)
    for _ in range(2):
        y, _ = ours(x)
        other = [y.detach(), *torch.autograd.grad(y.sin().sum(), list(ours.parameters()))]
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
