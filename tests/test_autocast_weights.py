"""Under autocast, calls of one context share the copies of weights that torch keeps for it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lstm_fast

H = 32
CELL, LSTM = lstm_fast.LSTMCell, lstm_fast.LSTM


def step(module: nn.Module, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    """y [B, H] of x [B, H], and the states."""
    if isinstance(module, nn.LSTMCell | CELL):
        state = module(x, state)
        return state[0], state
    y, state = module(x[None], state)
    return y[0], state


def loop(module: nn.Module, steps: int) -> Tensor:
    torch.manual_seed(1)
    x, state, ys = torch.randn(steps, 3, H).to(next(module.parameters()).device, torch.bfloat16), None, []
    for t in range(steps):
        y, state = step(module, x[t], state)
        ys.append(y)
    return torch.stack(ys)


def autocast(**kwargs: Any) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, **kwargs)


def saved_weights(run: Callable[[], Any]) -> int:
    """How many tensors of the size of W_hh, in 16 bits, are saved for backward: by their memory."""
    seen, kept = set(), []

    def look(node: Any) -> None:
        if node is None or node in seen:
            return
        seen.add(node)
        for t in getattr(node, "saved_tensors", ()):
            if t is not None and t.shape == (4 * H, H) and t.dtype == torch.bfloat16:
                kept.append(t)
        for after, _ in node.next_functions:
            look(after)

    look(run().grad_fn)
    return len({t.data_ptr() for t in kept})


@pytest.mark.parametrize("kind", [CELL, LSTM])
def test_a_loop_saves_each_weight_once(kind: Any) -> None:
    module = kind(H, H)
    with autocast():
        assert saved_weights(lambda: loop(module, 7)) == 2  # W_ih and W_hh


@pytest.mark.parametrize("kind", [CELL, LSTM])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_loop_casts_each_weight_once(kind: Any, mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given, layer = [], lstm_fast.lstm.layer  # all stay alive: each has memory of its own

    def watched(x: Tensor, h: Any, c: Any, weights: Any, *rest: Any) -> Any:
        given.extend(weights[0][:2])
        return layer(x, h, c, weights, *rest)

    monkeypatch.setattr(lstm_fast.lstm, "layer", watched)
    module = kind(H, H)
    with autocast(), mode():
        loop(module, 5)
    assert len(given) == 10 and len({t.data_ptr() for t in given}) == 2
    assert all(t.dtype == torch.bfloat16 for t in given)


@pytest.mark.parametrize(("kind", "torchs"), [(CELL, nn.LSTMCell), (LSTM, nn.LSTM)])
def test_gradients_are_as_near_to_fp64_as_torchs(kind: Any, torchs: Any) -> None:
    torch.manual_seed(0)
    theirs, oracle = torchs(H, H), torchs(H, H).double()
    ours = kind(H, H)
    for module in (ours, oracle):
        module.load_state_dict(theirs.state_dict())
    torch.manual_seed(1)
    x, state, ys = torch.randn(60, 3, H).bfloat16().double(), None, []
    for t in range(60):
        y, state = step(oracle, x[t], state)
        ys.append(y)
    right = torch.autograd.grad(torch.stack(ys).square().sum(), oracle.parameters())
    errors = []
    for module in (ours, theirs):
        with autocast():
            loss = loop(module, 60).double().square().sum()
        got = torch.autograd.grad(loss, module.parameters())
        errors.append([float((a - b).norm() / b.norm()) for a, b in zip(got, right, strict=True)])
    for mine, others in zip(*errors, strict=True):
        assert mine < 2 * others


def test_weights_that_change_between_contexts_are_cast_anew() -> None:
    """In any way, even behind autograd's back; and a graph of the old ones stays as it is."""
    module = CELL(H, H)
    found, kept = [], []
    for _ in range(3):
        with autocast():
            kept.append(loop(module, 2))
        fresh = CELL(H, H)
        fresh.load_state_dict(module.state_dict())
        with autocast():
            found.append(torch.equal(kept[-1], loop(fresh, 2)))
        module.weight_hh.data.mul_(2)
        with torch.no_grad():
            module.weight_ih.mul_(2)
    assert found == [True] * 3
    assert not torch.equal(kept[0], kept[1])
    kept[0].float().sum().backward()
    assert module.weight_ih.grad is not None


def test_a_copy_made_without_gradients_is_not_trained_on() -> None:
    """By torch's own layers, in the same context."""
    module = CELL(H, H)
    with autocast():
        with torch.no_grad():
            nn.functional.linear(torch.ones(1, H), module.weight_ih)
        loss = loop(module, 2).float().sum()
    loss.backward()
    assert module.weight_ih.grad is not None and module.weight_hh.grad is not None


def test_inference_first_and_training_then_share_a_context() -> None:
    module = CELL(H, H)
    with autocast():
        for mode in (torch.inference_mode, torch.no_grad):
            with mode():
                assert not loop(module, 2).requires_grad
        loop(module, 2).float().sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_saved_tensor_hooks_see_what_is_saved_and_nothing_else() -> None:
    module, packed = CELL(H, H), []

    def pack(t: Tensor) -> Tensor:
        packed.append(t)
        return t

    with autocast(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = loop(module, 1).float().sum()
    assert not any(t.numel() == 0 for t in packed)
    loss.backward()
    assert module.weight_hh.grad is not None


def test_parameters_made_in_inference_mode_serve() -> None:
    with torch.inference_mode():
        module = CELL(H, H)
        with autocast():
            inside = loop(module, 2)
    with torch.no_grad(), autocast():
        assert torch.equal(inside, loop(module, 2))


@pytest.mark.parametrize("frozen", ["weight_ih", "weight_hh"])
def test_frozen_weights_get_no_gradient(frozen: str) -> None:
    module = CELL(H, H)
    getattr(module, frozen).requires_grad_(False)
    with autocast():
        loop(module, 2).float().sum().backward()
    assert {name for name, p in module.named_parameters() if p.grad is None} == {frozen}


@pytest.mark.parametrize("kind", [CELL, LSTM])
def test_weights_that_change_within_a_context_are_taken_as_they_are(kind: Any) -> None:
    torch.manual_seed(0)
    module = kind(H, H)
    with autocast():
        for _ in range(2):
            module.zero_grad()
            loop(module, 2).float().sum().backward()
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.sub_(parameter.grad)
        found = loop(module, 2)
    with autocast():
        torch.testing.assert_close(found, loop(module, 2), rtol=0, atol=0)
