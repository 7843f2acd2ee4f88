"""Floats as three digits of 8 bits (csrc/cpu/digits.h), which AMX takes for most layers' forward pass.

They are as exact as floats, whatever the numbers: where digits can't be, the call is computed anew.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lstm_fast import LSTM
from lstm_fast._C import CPU_INSTRUCTION_SETS
from tests.cpu_case import WEIGHTS, case, check_errors, check_usual_errors, results, three

INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "one of each row": lambda x: torch.nn.functional.one_hot(x.argmax(-1), x.size(-1)).float(),
    "rows of all magnitudes": lambda x: x * 10 ** torch.linspace(-44, 1, x.size(0)).view(-1, 1, 1),
    "long tails": lambda x: torch.distributions.Laplace(0, 0.7).sample(x.shape),
    "some zeros": lambda x: x * (torch.rand_like(x) < 0.1),
    "one far above": lambda x: torch.cat([1e3 * x[..., :1], x[..., 1:]], -1),
    "all alike": lambda x: torch.full_like(x, 0.3),
}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("which", ["weight_hh", "weight_ih"])
@pytest.mark.parametrize(
    ("inputs", "hidden", "batch", "steps", "sizes"),
    [
        (128, 256, 12, 12, {}),
        (128, 256, 70, 5, {"bidirectional": True}),
        (140, 270, 33, 6, {}),
        (256, 256, 40, 2, {}),
        (192, 512, 9, 12, {}),
    ],
    ids=["few sequences", "both directions", "padded", "two steps", "large weights"],
)
def test_errors_are_within_twice_those_of_torch(
    inputs: int, hidden: int, batch: int, steps: int, sizes: dict[str, Any], which: str, weights: str
) -> None:
    modules = three(inputs, hidden, WEIGHTS[weights], which, **sizes)
    check_usual_errors(modules, weights, batch, steps)


@pytest.mark.skipif(CPU_INSTRUCTION_SETS[-1] != "amx", reason="this processor has no AMX")
def test_more_than_one_step_goes_by_digits() -> None:
    """A single one goes by planes, whose sums round elsewhere; else all of this file would test those."""
    ours, _, _ = three(128, 256, lambda w: w)
    x, states, _ = case(ours, 48, 2)
    with torch.no_grad():
        one, two = (ours(x[:steps], tuple(states))[0][0] for steps in (1, 2))
    assert not torch.equal(one, two)
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", INPUTS)
def test_inputs_of_any_kind_are_as_exact(kind: str) -> None:
    for weights in ("as they are made", "normal"):
        modules = three(128, 512, WEIGHTS[weights], "weight")
        x, states, dy = case(modules[0], 8, 12)
        check_errors(modules, (INPUTS[kind](x), states, dy))


@pytest.mark.parametrize("count", [1, 3, 20, 60])
@pytest.mark.parametrize("scale", [1e3, 1e6])
def test_features_whose_weights_make_up_for_their_scale_are_as_exact(scale: float, count: int) -> None:
    """As of a network that was trained on raw features: what is largest in x counts least in the sums."""

    def smaller(w: Tensor) -> Tensor:
        w[:, :count] /= scale
        return w

    modules = three(128, 256, smaller, "weight_ih")
    x, states, dy = case(modules[0], 12, 20)
    x[..., :count] = scale * x[..., :count].sign()
    check_errors(modules, (x, states, dy))
    x[..., count : count + 40] *= torch.rand_like(x[..., count : count + 40]) < 0.02  # of others few are there
    check_errors(modules, (x, states, dy))


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    used = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(used)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("where", ["x", "x alone", "weight_ih_l0", "weight_hh_l0", "h0"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_what_is_not_finite_or_nearly_so_comes_out_as_in_fp64(where: str, value: float) -> None:
    ours, _, oracle = three(128, 256, lambda w: w)
    x, states, _ = case(ours, 12, 8)
    x[3, 6] = 0
    tensors = {"x": x[3], "x alone": x[3, 1:], "h0": states[0][0], **dict(ours.named_parameters())}
    with torch.no_grad():
        tensors[where][5, 7] = value
        oracle.load_state_dict(ours.state_dict())
        y, (_, c_n) = ours(x, tuple(states))
        exact, (_, c_exact) = oracle(x.double(), tuple(s.double() for s in states))
    for a, right in ((y, exact), (c_n, c_exact)):
        assert torch.equal(a.isnan(), right.isnan())
        there = ~right.isnan()
        torch.testing.assert_close(a.double()[there], right[there], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "lengths",
    [[40] * 9 + [31, 30, 30, 12, 12, 5, 2, 1], [9] * 30 + [3] * 20, [3] * 500 + [2] * 200],
    ids=["long", "short", "many"],  # of many, three threads take rows each
)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_sequences_of_any_length_on_any_number_of_threads(
    bidirectional: bool, threads: int, lengths: list[int]
) -> None:
    """The bits are those of one thread, and a call twice gives the same."""
    torch.manual_seed(0)
    ours, oracle = (make(140, 256, bidirectional=bidirectional) for make in (LSTM, nn.LSTM))
    ours.backend = "cpu"
    oracle.double().load_state_dict(ours.state_dict())
    x = torch.randn(max(lengths), len(lengths), 140)

    def run(module: nn.Module, x: Tensor) -> list[Tensor]:
        with torch.no_grad():
            y, states = module(nn.utils.rnn.pack_padded_sequence(x, lengths))
        return [y.data, *states]

    first, second = run(ours, x), run(ours, x)
    torch.set_num_threads(1)
    for a, b, alone, exact in zip(first, second, run(ours, x), run(oracle, x.double()), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, alone)
        assert (a.double() - exact).abs().max() < 1e-5


def test_gradients_follow_from_a_forward_pass_in_digits() -> None:
    """Also where that was computed anew: gates and cells are the second one's."""
    for scale in (1.0, 1e6):
        modules = three(128, 256, lambda w: w)
        x, states, dy = case(modules[0], 20, 10)
        x[-1, :, 0] *= scale
        for a, exact in zip(
            results(modules[0], x, states, dy), results(modules[2], x, states, dy.double()), strict=True
        ):
            assert (a.double() - exact).norm() <= 1e-5 * exact.norm()
