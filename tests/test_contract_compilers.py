"""Compilers, exporters and tracers see one operator, or, where their graphs must be torch's, aten::lstm."""

import io
import warnings

import pytest
import torch
from torch import library, nn
from torch._subclasses import FakeTensorMode
from torch.func import grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import lstm_fast

onnx = pytest.importorskip("onnx")


def make(cls=lstm_fast.LSTM, **config):
    torch.manual_seed(0)
    return cls(3, 4, **config)


X = torch.randn(3, 2, 3, generator=torch.Generator().manual_seed(0))


def result_and_gradients(module, x, call):
    x = x.clone().requires_grad_()
    y = call(x)[0]
    return [y, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])]


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_layers": 2, "bidirectional": True, "batch_first": True},
        {"num_layers": 2, "dropout": 0.5},
        {"proj_size": 2},
        {"bias": False, "backend": "reference"},
    ],
    ids=str,
)
def test_compile_without_a_graph_break(config):
    module = make(**config).eval()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for a, b in zip(result_and_gradients(module, X, compiled), result_and_gradients(module, X, module), strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(compiled(X)[0], module(X)[0])


def test_compile_with_the_default_backend_in_training():
    model = nn.Sequential(make(num_layers=2, dropout=0.5))
    compiled = torch.compile(model, fullgraph=True)
    compiled(X)[0].sum().backward()
    assert model[0].weight_hh_l1.grad.any()


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("backend", "served_by"), [("auto", "cpu"), ("cpu", "cpu"), ("reference", "reference")])
@pytest.mark.parametrize("cls", [lstm_fast.LSTM, lstm_fast.LSTMCell])
def test_a_compiled_graph_holds_the_kernel_that_an_eager_call_takes(cls, backend, served_by, training):
    module, x = make(cls, backend=backend), X if cls is lstm_fast.LSTM else X[0]
    held = []

    def keep(graph, _):
        held.extend(n.args[-2] for n in graph.graph.nodes if n.target is torch.ops.lstm_fast.layer)
        return graph.forward

    with torch.set_grad_enabled(training):
        torch.compile(module, fullgraph=True, backend=keep)(x)
    assert held == [served_by]


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x: vmap(f)(torch.stack([x, x.flip(0)])),
        lambda f, x: jvp(f, (x,), (torch.ones_like(x),)),
        lambda f, x: grad(lambda v: f(v).sum())(x),
    ],
    ids=["vmap", "jvp", "grad"],
)
def test_a_transform_inside_a_compiled_function(transform, compiler):
    module = make(bidirectional=True)
    compiled = torch.compile(lambda x: transform(lambda v: module(v)[0], x), backend=compiler)
    torch.testing.assert_close(compiled(X), transform(lambda v: module(v)[0], X))


def test_compile_once_for_all_lengths():
    module = make()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for steps in (6, 5, 9):  # not 3, the features: equal sizes would share a symbol
            x = torch.randn(steps, 2, 3)
            torch.testing.assert_close(compiled(x)[0], module(x)[0])


def test_compile_a_cell():
    cell = make(lstm_fast.LSTMCell)
    compiled = torch.compile(cell, fullgraph=True, backend="aot_eager")
    for a, b in zip(result_and_gradients(cell, X[0], compiled), result_and_gradients(cell, X[0], cell), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("strict", [True, False])
def test_export_with_any_length_and_batch(strict):
    module = make(num_layers=2, bidirectional=True)
    dims = {0: torch.export.Dim("steps", min=2, max=100), 1: torch.export.Dim("batch", min=2, max=64)}
    program = torch.export.export(module, (X,), dynamic_shapes={"input": dims}, strict=strict)
    assert "lstm_fast.layer" in str(program.graph)
    for shape in ((3, 2, 3), (17, 5, 3)):
        x = torch.randn(*shape)
        torch.testing.assert_close(program.module()(x)[0], module(x)[0])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("save", [False, True])
def test_operators_keep_the_rules(backend, packed, save):
    """opcheck: schema, autograd registration, fake tensors, compilation with dynamic shapes."""
    weights = [p.detach().clone().requires_grad_(save) for p in make(bidirectional=True).parameters()]
    x, h0, c0 = (torch.randn(*shape, requires_grad=save) for shape in ((6, 3), (2, 3, 4), (2, 3, 4)))
    batch_sizes = torch.tensor([3, 2, 1]) if packed else None
    arguments = (x, h0, c0, *weights[:4], None, *weights[4:], None, batch_sizes, backend, save)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = library.opcheck(torch.ops.lstm_fast.layer.default, arguments)
    assert set(found.values()) == {"SUCCESS"}
    if not save:
        return
    with torch.no_grad():
        y, h_n, c_n, gates, cells = torch.ops.lstm_fast.layer(*arguments)
    inputs = [None if t is None else t.detach() for t in arguments[:13]]
    needs = [t is not None for t in inputs]
    backward = (y, h_n, c_n, *inputs, batch_sizes, y, gates, cells, backend, needs)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    found = library.opcheck(torch.ops.lstm_fast.layer_backward.default, backward, test_utils=tests)
    assert set(found.values()) == {"SUCCESS"}


@pytest.mark.parametrize("needs", [[0], [1, 3], [4, 9], list(range(13))])
def test_fake_gradients_have_the_real_ones_shapes(needs):
    weights = [p.detach() for p in make(bidirectional=True).parameters()]
    states = torch.randn(6, 3), torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    inputs = (*states, *weights[:4], None, *weights[4:], None)
    y, h_n, c_n, gates, cells = torch.ops.lstm_fast.layer(*inputs, None, "reference", True)
    mask = [i in needs for i in range(13)]
    arguments = (y, h_n, c_n, *inputs, None, y, gates, cells, "reference", mask)
    real = torch.ops.lstm_fast.layer_backward(*arguments)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in arguments]
        fake = torch.ops.lstm_fast.layer_backward(*fakes)
    assert [t.shape for t in real] == [t.shape for t in fake]


def test_fake_meta_and_proxy_tensors():
    module = make()
    with FakeTensorMode():
        assert make()(torch.randn(5, 2, 3))[0].shape == (5, 2, 4)
    assert make(device="meta")(torch.randn(5, 2, 3, device="meta"))[0].shape == (5, 2, 4)
    graph = make_fx(lambda x: module(x)[0])(X)
    torch.testing.assert_close(graph(X), module(X)[0])


@pytest.mark.filterwarnings("ignore")
def test_a_trace_holds_torchs_operator_and_generalises():
    module = make(num_layers=2, bidirectional=True)
    traced = torch.jit.trace(module, (X,))
    assert "aten::lstm" in str(traced.inlined_graph)
    x = torch.randn(7, 5, 3)
    torch.testing.assert_close(traced(x)[0], module(x)[0])


@pytest.mark.parametrize("with_state", [False, True])
def test_a_trace_of_a_cell_warns_of_nothing(with_state):
    cell = make(lstm_fast.LSTMCell)
    args = (X[0], (torch.randn(2, 4), torch.randn(2, 4))) if with_state else (X[0],)
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(cell, args)
    torch.testing.assert_close(traced(*args), cell(*args))


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = make(num_layers=2)
        self.cell = make(lstm_fast.LSTMCell)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lstm(x)[0] + self.cell(x[0])[0]


class WrappedPacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = make()

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return self.lstm(nn.utils.rnn.pack_padded_sequence(x, lengths))[0].data


@pytest.mark.filterwarnings("ignore")
def test_script_inside_another_module():
    model = Wrapped()
    before, weights = model(X), [*model.parameters()]
    torch.testing.assert_close(torch.jit.script(model)(X), before)
    torch.testing.assert_close(model(X), before)  # it now holds torch's modules, with its own parameters
    assert all(a is b for a, b in zip(model.parameters(), weights, strict=True))
    packed, lengths = WrappedPacked(), torch.tensor([3, 2])
    torch.testing.assert_close(torch.jit.script(packed)(X, lengths), packed(X, lengths))


def with_own_forward(base):
    class Normalised(base):
        def __init__(self):
            super().__init__(3, 4)
            self.norm = nn.LayerNorm(16)

        def forward(self, input: torch.Tensor, hx: tuple[torch.Tensor, torch.Tensor]):
            gates = nn.functional.linear(hx[0], self.weight_hh, self.bias_hh)
            i, f, g, o = self.norm(gates + nn.functional.linear(input, self.weight_ih, self.bias_ih)).chunk(4, 1)
            c = f.sigmoid() * hx[1] + i.sigmoid() * g.tanh()
            return o.sigmoid() * c.tanh(), c

    return Normalised()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("base", [nn.LSTMCell, lstm_fast.LSTMCell])
def test_script_of_a_subclass_compiles_its_own_forward(base):
    torch.manual_seed(0)
    cell, states = with_own_forward(base), (torch.randn(2, 4), torch.randn(2, 4))
    torch.testing.assert_close(torch.jit.script(cell)(X[0], states), cell(X[0], states))


@pytest.mark.filterwarnings("ignore")
def test_script_of_a_subclass_without_one_is_torchs():
    class Named(lstm_fast.LSTM):
        pass

    model = Wrapped()
    model.lstm.__class__ = Named
    torch.testing.assert_close(torch.jit.script(model)(X), model(X))


def test_fx_takes_the_modules_as_leaves():
    model = Wrapped()
    graph = torch.fx.symbolic_trace(model)
    assert [n.target for n in graph.graph.nodes if n.op == "call_module"] == ["lstm", "cell"]
    torch.testing.assert_close(graph(X), model(X))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("cls", [lstm_fast.LSTM, lstm_fast.LSTMCell])
def test_fx_does_where_only_the_states_are_traced(cls, frozen):
    module, x = make(cls).requires_grad_(not frozen), X if cls is lstm_fast.LSTM else X[0]
    state = torch.randn(*(() if cls is lstm_fast.LSTMCell else (1,)), 2, 4)

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, h, c):
            return self.module(x, (h, c))[0]

    graph = torch.fx.symbolic_trace(Decoder())
    assert "call_module" in [n.op for n in graph.graph.nodes]
    torch.testing.assert_close(graph(state, state), module(x, (state, state))[0])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [False, True])
def test_onnx_holds_one_lstm_a_layer(dynamo):
    module = nn.Sequential(make(num_layers=2)).eval()  # within a model: before 2.10 torch refuses an nn.LSTM itself
    buffer = io.BytesIO()
    if dynamo:
        torch.onnx.export(module, (X,), dynamo=True, verbose=False).save(buffer)
    else:
        torch.onnx.export(module, (X,), buffer, dynamo=False)
    model = onnx.load_from_string(buffer.getvalue())
    assert [n.op_type for n in model.graph.node].count("LSTM") == 2
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
    (y, *_) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), module(X)[0].detach(), rtol=1e-4, atol=1e-5)


def test_packed_input_under_compile_is_right_if_not_one_graph():
    model = WrappedPacked()
    lengths = torch.tensor([3, 2])
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(X, lengths), model(X, lengths))


@pytest.mark.filterwarnings("ignore")
def test_quantize_dynamic_leaves_it_alone():
    model = nn.Sequential(make())
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.LSTM}, dtype=torch.qint8)
    assert type(quantised[0]) is lstm_fast.LSTM
