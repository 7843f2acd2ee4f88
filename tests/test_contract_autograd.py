"""Gradients of every order and in every mode: all that torch.nn.LSTM has on any of its CPU paths."""

import gc
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

import lstm_fast

F64 = {"dtype": torch.float64}


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    return request.param


def make(backend="auto", **config):
    torch.manual_seed(0)
    return lstm_fast.LSTM(3, 4, 2, bidirectional=True, backend=backend, **config, **F64)


def data():
    torch.manual_seed(1)
    return torch.randn(3, 2, 3, **F64), torch.randn(4, 2, 4, **F64), torch.randn(4, 2, 4, **F64)


def torchs(module):
    twin = nn.LSTM(3, 4, 2, bidirectional=True, **F64)
    twin.load_state_dict(module.state_dict())
    return twin


@pytest.mark.parametrize("pick", [lambda y, h, c: c, lambda y, h, c: h[0], lambda y, h, c: y[1], lambda y, h, c: c[3]])
def test_any_part_of_the_outputs_may_carry_the_gradient(backend, pick):
    module = make(backend)
    found = []
    for m in (torchs(module), module):
        x, h0, c0 = (t.requires_grad_() for t in data())
        y, (h, c) = m(x, (h0, c0))
        inputs = [x, h0, c0, *m.parameters()]
        found.append(torch.autograd.grad(pick(y, h, c).sum(), inputs, allow_unused=True))
    for theirs, ours in zip(*found, strict=True):
        zero = torch.zeros(())
        torch.testing.assert_close(
            zero if ours is None or not ours.any() else ours,
            zero if theirs is None or not theirs.any() else theirs,
            check_dtype=False,
        )


def test_frozen_parameters_get_none_and_grad_mode_rules(backend):
    module = make(backend).requires_grad_(False)
    module.weight_hh_l1.requires_grad_()
    x, _, _ = data()
    y, (h, _) = module(x)
    assert y.requires_grad and h.requires_grad
    y.sum().backward()
    assert [name for name, p in module.named_parameters() if p.grad is not None] == ["weight_hh_l1"]
    with torch.no_grad():
        assert not module(x)[0].requires_grad
    with torch.inference_mode():
        assert module(x)[0].is_inference()
    assert not module.requires_grad_(False)(x)[0].requires_grad


def test_bias_gradients_are_equal_and_apart(backend):
    module = make(backend)
    module(data()[0])[0].sum().backward()
    assert torch.equal(module.bias_ih_l0.grad, module.bias_hh_l0.grad)
    assert module.bias_ih_l0.grad.data_ptr() != module.bias_hh_l0.grad.data_ptr()
    assert all(p.grad.is_contiguous() for p in module.parameters())
    once = module.weight_hh_l0.grad.clone()
    module(data()[0])[0].sum().backward()
    assert torch.equal(module.weight_hh_l0.grad, 2 * once)  # grads accumulate


def test_second_backward(backend):
    module = make(backend)
    x = data()[0].requires_grad_()
    y = module(x)[0].sum()
    first = torch.autograd.grad(y, [x, *module.parameters()], retain_graph=True)
    second = torch.autograd.grad(y, [x, *module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, x)


@pytest.mark.parametrize("what", ["weight", "input"])
def test_a_change_in_place_between_forward_and_backward_raises(backend, what):
    module = lstm_fast.LSTM(3, 4, backend=backend, **F64)
    x = data()[0]
    y, (h, c) = module(x)
    with torch.no_grad():
        {"weight": module.weight_hh_l0, "input": x}[what].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (y.sum() + h.sum()).backward()
    y, (h, c) = module(data()[0])
    with torch.no_grad():
        h.zero_()
        c.zero_()
    y.sum().backward()  # the states may change


def test_odd_layouts_of_the_incoming_gradient(backend):
    module = make(backend)
    x = data()[0].requires_grad_()
    y, (h, _) = module(x)
    for g in (torch.ones(1, 1, 1, **F64).expand_as(y), torch.randn(8, 2, 3, **F64).permute(2, 1, 0)):
        odd = torch.autograd.grad(y, x, g, retain_graph=True)
        plain = torch.autograd.grad((y, h), x, (g.contiguous(), torch.zeros_like(h)), retain_graph=True)
        assert torch.equal(odd[0], plain[0])


@pytest.mark.parametrize("proj", [0, 2])
def test_first_and_second_derivatives_against_numbers(backend, proj):
    module = make("auto" if proj and backend == "cpu" else backend, proj_size=proj)
    names = [name for name, _ in module.named_parameters()]

    def run(x, h0, c0, *weights):
        y, s = functional_call(module, dict(zip(names, weights, strict=True)), (x, (h0, c0)))
        return y, *s

    x, h0, c0 = data()
    inputs = [x, h0[..., :proj] if proj else h0, c0, *module.parameters()]
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


def test_second_derivatives_of_packed_input_and_empty_batches(backend):
    module = make(backend)

    def run(x):
        packed = nn.utils.rnn.pack_padded_sequence(x, [1, 3], enforce_sorted=False)
        y, (h, c) = module(packed)
        return y.data, h, c

    assert torch.autograd.gradgradcheck(run, data()[0].requires_grad_(), fast_mode=True)
    x = torch.zeros(3, 0, 3, **F64, requires_grad=True)
    (first,) = torch.autograd.grad(module(x)[0].sum(), x, create_graph=True)
    assert first.shape == x.shape


def test_inputs_that_depend_on_each_other_are_not_counted_twice(backend):
    """x made of h_0: the derivative by h_0 under create_graph must not take x's path again."""
    module = make(backend)
    found = []
    for m in (torchs(module), module):
        h0 = data()[1].requires_grad_()
        x = h0[:3, :, :3] * 2
        (first,) = torch.autograd.grad(m(x, (h0, h0))[0].square().sum(), h0, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), h0)
        found.append((first.detach(), second))
    torch.testing.assert_close(found[1], found[0])


def test_backward_in_eval_mode(backend):
    module = make(backend).eval()
    module(data()[0])[0].sum().backward()
    assert module.weight_hh_l0.grad.any()


def test_transforms_agree_with_torchs_reverse_mode():
    module = make()
    twin = torchs(module)
    x = data()[0]

    def ours(v):
        return module(v)[0]

    jacobian = torch.autograd.functional.jacobian(lambda v: twin(v)[0], x)
    for transform in (jacrev, jacfwd):
        torch.testing.assert_close(transform(ours)(x), jacobian)
    direction = torch.randn_like(x)
    along = (jacobian * direction).sum((3, 4, 5))
    torch.testing.assert_close(jvp(ours, (x,), (direction,))[1], along)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(ours(forward_ad.make_dual(x, direction))).tangent
    torch.testing.assert_close(tangent, along)
    y, pull = vjp(ours, x)
    g = torch.randn_like(y)
    torch.testing.assert_close(pull(g)[0], torch.einsum("tbf,tbfuvw->uvw", g, jacobian))
    curvature = torch.autograd.functional.hessian(lambda v: twin(v)[0].sum(), x)
    torch.testing.assert_close(hessian(lambda v: ours(v).sum())(x), curvature)


@pytest.mark.parametrize("directions", [1, 2])
def test_batches_of_gradients(backend, directions):
    module = make(backend) if directions == 2 else lstm_fast.LSTM(3, 4, backend=backend, **F64)
    x = data()[0].requires_grad_()
    y = module(x)[0]
    gs = torch.randn(5, *y.shape, **F64)
    (batched,) = torch.autograd.grad(y, x, gs, is_grads_batched=True, retain_graph=True)
    one_by_one = torch.stack([torch.autograd.grad(y, x, g, retain_graph=True)[0] for g in gs])
    torch.testing.assert_close(batched, one_by_one)
    vectorised = torch.autograd.functional.jacobian(lambda v: module(v)[0], x.detach(), vectorize=True)
    torch.testing.assert_close(vectorised, torch.autograd.functional.jacobian(lambda v: module(v)[0], x.detach()))


def test_vmap_over_samples_gradients_and_ensembles():
    module = make()
    xs = torch.randn(4, 3, 2, 3, **F64)
    torch.testing.assert_close(vmap(lambda v: module(v)[0])(xs), torch.stack([module(x)[0] for x in xs]))
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(p, v):
        return functional_call(module, p, (v,))[0].square().sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, xs)
    for i, x in enumerate(xs):
        torch.testing.assert_close(per_sample["weight_hh_l0"][i], grad(loss)(parameters, x)["weight_hh_l0"])
    models = [make(), make()]
    nn.init.zeros_(models[1].weight_hh_l0)
    stacked, _ = stack_module_state(models)
    together = vmap(lambda p: functional_call(module, p, (xs[0],))[0])(stacked)
    torch.testing.assert_close(together, torch.stack([m(xs[0])[0] for m in models]))


def test_saved_tensor_hooks_anomaly_mode_and_other_threads(backend):
    module = make(backend)
    x = data()[0].requires_grad_()
    (plain,) = torch.autograd.grad(module(x)[0].sum(), x)
    with torch.autograd.graph.save_on_cpu(), torch.autograd.detect_anomaly(check_nan=True):
        (hooked,) = torch.autograd.grad(module(x)[0].sum(), x)
    loss, found = module(x)[0].sum(), []
    thread = threading.Thread(target=lambda: found.append(torch.autograd.grad(loss, x)[0]))
    thread.start()
    thread.join()
    assert torch.equal(plain, hooked) and torch.equal(plain, found[0])


def test_the_graph_owns_its_tensors_and_lets_them_go(backend):
    module = make(backend)
    x = data()[0]
    alive = weakref.ref(x)
    y = module(x)[0]
    del x
    y.sum().backward()
    del y
    gc.collect()
    assert alive() is None


def test_an_optimiser_follows_torchs_path(backend):
    ours = make(backend)
    theirs = torchs(ours)
    x = data()[0]
    for module in (ours, theirs):
        optimiser = torch.optim.Adam(module.parameters(), 0.05)
        for _ in range(5):
            optimiser.zero_grad()
            module(x)[0].square().sum().backward()
            optimiser.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_frozen_weights_cost_no_products_under_create_graph(backend):
    module = make(backend)
    x = data()[0].requires_grad_()

    def products():
        y = module(x)[0].sum()
        with torch.profiler.profile() as profile:
            torch.autograd.grad(y, x, create_graph=True)
        return sum(event.name == "aten::mm" for event in profile.events())

    learning = products()
    module.requires_grad_(False)
    assert learning - products() == 2 * 2 * 2  # W_ih and W_hh of each layer and direction


def test_gradients_of_the_two_biases_are_two_tensors(backend):
    module = make(backend)
    y = module(data()[0])[0].sum()
    ih, hh = torch.autograd.grad(y, [module.bias_ih_l0, module.bias_hh_l0], create_graph=True)
    assert torch.equal(ih, hh) and ih.data_ptr() != hh.data_ptr()
