"""Tensors that don't lie as a kernel reads them, or that came to be otherwise before the backward pass."""

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_map

import lstm_fast
from lstm_fast import checks

IN, H = 3, 4
PAIRS = [(nn.LSTM, lstm_fast.LSTM), (nn.LSTMCell, lstm_fast.LSTMCell)]
every_pair = pytest.mark.parametrize("pair", PAIRS, ids=["LSTM", "LSTMCell"])
both_modes = pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])


class Wrapper(torch.Tensor):
    """Holds another tensor, as quantised and distributed ones do; it has no memory of its own."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, requires_grad=held.requires_grad)

    def __init__(self, held):
        self.held = held.detach()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        args, kwargs = (tree_map(lambda t: t.held if isinstance(t, cls) else t, a) for a in (args, kwargs or {}))
        return tree_map(lambda t: cls(t) if isinstance(t, torch.Tensor) else t, function(*args, **kwargs))


def twins(pair, *sizes, **config):
    """torch's module and ours with the same weights, in fp64."""
    torch.manual_seed(0)
    theirs = pair[0](*(sizes or (IN, H)), **config).double()
    ours = pair[1](*(sizes or (IN, H)), **config).double()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def case(pair):
    """x and states."""
    torch.manual_seed(1)
    cell = pair[0] is nn.LSTMCell
    x, h, c = torch.randn(2, IN), torch.randn(2, H), torch.randn(2, H)
    return [t.double() for t in ((x, h, c) if cell else (torch.randn(5, 2, IN), h[None], c[None]))]


def gradients(module, x, h, c):
    return torch.autograd.grad(module(x, (h, c))[0].square().sum(), [x, h, c, *module.parameters()])


@every_pair
@both_modes
@pytest.mark.parametrize("where", ["weight", "state"])
def test_wrapped_weights_and_states_are_seen_by_their_own_class(pair, where, training):
    theirs, ours = twins(pair)
    x, h, c = case(pair)
    if where == "state":
        h, c = Wrapper(h), Wrapper(c)
    found = []
    for module in (theirs, ours):
        if where == "weight":
            name = next(name for name, _ in module.named_parameters() if name.startswith("weight_hh"))
            setattr(module, name, nn.Parameter(Wrapper(getattr(module, name).detach()), requires_grad=False))
        with torch.set_grad_enabled(training):
            y = module(x, (h, c))[0]
        assert type(y) is Wrapper
        found.append([y.held])
        if training:
            learning = [p for p in module.parameters() if p.requires_grad]
            found[-1] += [g.held for g in torch.autograd.grad(y, learning, Wrapper(torch.ones_like(y.held)))]
    torch.testing.assert_close(found[1], found[0])


@every_pair
@both_modes
def test_zeros_that_torch_does_not_store(pair, training):
    theirs, ours = twins(pair)
    x, h, c = case(pair)
    zeros = torch._efficientzerotensor(x.shape, dtype=x.dtype)
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(ours(zeros, (h, c))[0], theirs(zeros, (h, c))[0])


@every_pair
@both_modes
def test_a_single_number_that_is_part_of_a_conjugate(pair, training):
    """The only floats that functions of torch's own API leave negated where they lie, but for views with gaps."""
    theirs, ours = twins(pair, 1, 1)
    shape = (1, 1) if pair[0] is nn.LSTMCell else (1, 1, 1)
    part = torch.tensor(2 + 3j, dtype=torch.complex128).conj().imag.view(shape)
    assert part.is_neg()
    with torch.set_grad_enabled(training):
        for args in ((part,), (part, (part, part))):
            torch.testing.assert_close(ours(*args)[0], theirs(*args)[0])


@every_pair
def test_a_gradient_that_is_part_of_a_conjugate(pair):
    found = []
    for module in twins(pair, 1, 1):
        y = module(torch.ones((1, 1) if pair[0] is nn.LSTMCell else (1, 1, 1)).double())[0]
        (torch.complex(torch.zeros_like(y), y).conj() * (2 + 3j)).abs().sum().backward()
        found.append([p.grad for p in module.parameters()])
    torch.testing.assert_close(found[1], found[0])


@every_pair
@pytest.mark.parametrize("index", range(-3, 0), ids=["output", "gates", "cells"])
def test_what_was_saved_may_come_back_with_other_strides(pair, index):
    _, ours = twins(pair)
    inputs = [t.requires_grad_() for t in case(pair)]
    want = gradients(ours, *inputs)
    found = []
    for position in range(saved_by(ours, inputs)):
        with saved_tensors_hooks(*Changing(position, lambda t: t.mT.contiguous().mT if t.dim() > 1 else t).hooks):
            found.append(gradients(ours, *inputs))
    torch.testing.assert_close(found[index], want)


@every_pair
@pytest.mark.parametrize("index", range(-3, 0), ids=["output", "gates", "cells"])
@pytest.mark.parametrize("change", [lambda t: t.bfloat16(), lambda t: t[..., :-1].contiguous()], ids=["dtype", "size"])
def test_what_came_back_as_something_else_is_refused(pair, index, change):
    _, ours = twins(pair)
    inputs = [t.requires_grad_() for t in case(pair)]
    position = saved_by(ours, inputs) + index
    with (
        saved_tensors_hooks(*Changing(position, change).hooks),
        pytest.raises(RuntimeError, match=r"should come back as|should have kept their sizes"),
    ):
        gradients(ours, *inputs)


class Changing:
    """Hooks that change the position-th tensor saved when it is asked for."""

    def __init__(self, position, change):
        self.count, self.position, self.change = 0, position, change
        self.hooks = self.pack, self.unpack

    def pack(self, tensor):
        self.count += 1
        return self.count - 1, tensor

    def unpack(self, packed):
        index, tensor = packed
        return self.change(tensor) if index == self.position else tensor


def saved_by(module, inputs):
    """How many tensors a call saves."""
    counted = Changing(-1, None)
    with saved_tensors_hooks(*counted.hooks):
        module(inputs[0], tuple(inputs[1:]))
    return counted.count


IN_PLACE = {
    "dropped out": lambda y: nn.functional.dropout(y, 0.5, inplace=True),
    "rectified": torch.relu_,
    "reset": lambda y: y.index_fill_(-2, torch.tensor([1]), 0),
}


@pytest.mark.parametrize("change", IN_PLACE.values(), ids=IN_PLACE.keys())
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    "config", [{}, {"bidirectional": True}, {"proj_size": 2}, {"batch_first": True, "num_layers": 2}], ids=str
)
def test_an_output_may_be_changed_in_place(config, backend, change):
    theirs, ours = twins(PAIRS[0], **config)
    ours.backend = backend
    x = torch.randn(5, 2, IN).double().requires_grad_()
    found = []
    for module, changed in ((theirs, lambda y: change(y.clone())), (ours, change)):
        torch.manual_seed(3)
        found.append(torch.autograd.grad(changed(module(x)[0]).square().sum(), [x, *module.parameters()]))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("change", [IN_PLACE["rectified"], IN_PLACE["reset"]], ids=["rectified", "reset"])
def test_and_within_a_compiled_function(change):
    torch._dynamo.reset()
    theirs, ours = twins(PAIRS[0], bidirectional=True)
    compiled = torch.compile(lambda x: change(ours(x)[0]), backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 2, IN).double().requires_grad_()
    got = torch.autograd.grad(compiled(x).square().sum(), [x, *ours.parameters()])
    want = torch.autograd.grad(change(theirs(x)[0].clone()).square().sum(), [x, *theirs.parameters()])
    torch.testing.assert_close(got, want)


def test_an_output_is_made_again_in_its_own_dtype_under_autocast():
    module = lstm_fast.LSTM(IN, H, proj_size=2)
    x = torch.randn(5, 2, IN)
    want = torch.autograd.grad(torch.relu(module(x)[0]).sum(), [*module.parameters()])
    loss = torch.relu_(module(x)[0]).sum()
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(loss, [*module.parameters()])
    torch.testing.assert_close(got, want)


def test_so_may_a_packed_one():
    theirs, ours = twins(PAIRS[0])
    packed = pack_padded_sequence(torch.randn(5, 2, IN).double(), [5, 3])
    found = []
    for module, changed in ((theirs, lambda y: y.clone().relu_()), (ours, torch.relu_)):
        found.append(torch.autograd.grad(changed(module(packed)[0].data).square().sum(), [*module.parameters()]))
    torch.testing.assert_close(found[1], found[0])


def test_episodes_that_end_are_reset_in_a_cells_states():
    done, found = torch.tensor([False, True]), []
    for module in twins(PAIRS[1]):
        x, h, c = case(PAIRS[1])
        total = torch.zeros(())
        for _ in range(3):
            h, c = module(x, (h, c))
            total = total + h.sum()
            h[done] = 0
            c[done] = 0
        found.append(torch.autograd.grad(total, [*module.parameters()]))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_output_made_again_is_the_one_that_was(dtype):
    module = lstm_fast.LSTM(IN, H, bidirectional=True, backend="cpu").to(dtype)
    y, _ = module(torch.randn(5, 2, IN).to(dtype))
    *_, kept, gates, cells = y.grad_fn.saved_tensors
    weights = [(*(module._parameters[n] for n in names), None) for names in module._all_weights]
    interleaved = gates.view(2, 10, 4, H).permute(1, 0, 3, 2).reshape(10, 2 * 4 * H)
    for backend, own in (("cpu", gates), ("persistent", interleaved)):
        again = checks.output_from(backend, kept, weights, own, cells)
        torch.testing.assert_close(again, y.detach(), atol=torch.finfo(dtype).eps, rtol=2 * torch.finfo(dtype).eps)


def test_what_counts_changes_holds_no_memory():
    module = lstm_fast.LSTM(IN, H)
    y, _ = module(torch.randn(5, 2, IN))
    counter, count = y.grad_fn.changes
    assert counter.numel() == 0 and counter.untyped_storage().nbytes() == 0 and counter._version == count
    y.detach().add_(1)
    assert counter._version == count + 1


@every_pair
@pytest.mark.parametrize("which", ["x", "weight", "state", "output", "gates", "cells", "gradient"])
def test_memory_given_back_before_the_backward_pass_is_refused(pair, which):
    """By torch where it looks at what it has to take apart first."""
    _, ours = twins(pair)
    x, h, c = case(pair)
    y, _ = ours(x, (h, c))
    *_, kept, gates, cells = y.grad_fn.saved_tensors
    grad = torch.ones_like(y)
    tensors = {"x": x, "weight": next(ours.parameters()), "state": c, "output": kept, "gates": gates, "cells": cells}
    {**tensors, "gradient": grad}[which].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"has no memory|out of bounds"):
        y.backward(grad)


@every_pair
@both_modes
def test_and_before_the_forward_pass(pair, training):
    for index in range(3):
        _, ours = twins(pair)
        x, h, c = tensors = case(pair)
        tensors[index].untyped_storage().resize_(0)
        with torch.set_grad_enabled(training), pytest.raises(RuntimeError, match=r"has no memory|out of bounds"):
            ours(x, (h, c))
