"""Who serves a call, and what is said about it."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import lstm_fast
from lstm_fast import dispatch
from lstm_fast import lstm as module_file

X = torch.randn(4, 2, 3)


@pytest.fixture
def broken(monkeypatch):
    """Every compiled kernel is missing."""
    for kernel in dispatch.KERNELS.values():
        monkeypatch.setattr(kernel, "unavailable", lambda: "it was not built")
    for name in ("infer", "train"):
        monkeypatch.setattr(module_file, name, lambda *_: None)


def test_every_backend_is_listed_with_a_reason():
    found = lstm_fast.backends()
    assert [*found] == ["persistent", "cuda", "triton", "cpu", "reference"]
    assert all(status.detail for status in found.values())
    assert found["reference"].available and found["cpu"].available
    if not torch.cuda.is_available():
        assert not found["cuda"].available


def test_auto_takes_the_kernel_and_says_so():
    assert lstm_fast.explain(lstm_fast.LSTM(3, 5), X).startswith("cpu: a whole layer")
    assert lstm_fast.explain(lstm_fast.LSTMCell(3, 5), X[0]).startswith("cpu:")
    packed = nn.utils.rnn.pack_padded_sequence(X, [4, 2])
    assert lstm_fast.explain(lstm_fast.LSTM(3, 5, bidirectional=True), packed).startswith("cpu:")
    assert lstm_fast.explain(lstm_fast.LSTM(3, 5, proj_size=2), packed).startswith("cpu:")


@pytest.mark.parametrize(
    "config, x, words",
    [
        ({"dtype": torch.complex64}, X.to(torch.complex64), "complex64"),
        ({"device": "meta"}, X.to("meta"), "no kernel serves device meta"),
    ],
)
def test_what_no_kernel_covers_runs_on_torch_with_the_reason(config, x, words):
    module = lstm_fast.LSTM(3, 5, **config)
    told = lstm_fast.explain(module, x)
    assert told.startswith("torch: ") and words in told
    assert module(x)[0].shape == (4, 2, 5)


def test_auto_falls_back_when_kernels_are_missing(broken):
    module = lstm_fast.LSTM(3, 5)
    assert lstm_fast.explain(module, X) == "torch: cpu: it was not built"
    twin = nn.LSTM(3, 5)
    twin.load_state_dict(module.state_dict())
    assert torch.equal(module(X)[0], twin(X)[0])


@pytest.mark.parametrize("name", ["persistent", "cuda", "triton", "cpu"])
def test_a_named_backend_that_cannot_serve_raises(broken, name):
    for module, x in ((lstm_fast.LSTM(3, 5, backend=name), X), (lstm_fast.LSTMCell(3, 5, backend=name), X[0])):
        with pytest.raises(RuntimeError, match=f'backend="{name}" cannot serve this call: it was not built'):
            module(x)


@pytest.mark.parametrize(
    "config, x, words",
    [
        ({"dtype": torch.complex64}, X.to(torch.complex64), "it serves"),
        ({"device": "meta"}, X.to("meta"), "not on meta"),
    ],
)
def test_a_kernel_says_what_it_does_not_serve(config, x, words):
    with pytest.raises(RuntimeError, match='backend="cpu" cannot serve this call') as caught:
        lstm_fast.LSTM(3, 5, **config, backend="cpu")(x)
    assert words in str(caught.value)


def test_transforms_go_to_the_reference_and_a_named_kernel_says_so():
    modules = {backend: lstm_fast.LSTM(3, 5, backend=backend) for backend in ("auto", "reference", "cpu")}
    for backend in ("auto", "reference"):
        y = torch.func.vmap(lambda x, m=modules[backend]: m(x)[0])(X.unsqueeze(0))
        torch.testing.assert_close(y[0], modules[backend](X)[0])
    with pytest.raises(RuntimeError, match=r'backend="cpu" cannot serve this call: a torch.func transform'):
        torch.func.vmap(lambda x: modules["cpu"](x)[0])(X.unsqueeze(0))


def test_the_environment_names_the_default(monkeypatch):
    module, named = lstm_fast.LSTM(3, 5), lstm_fast.LSTM(3, 5, backend="cpu")
    monkeypatch.setenv("LSTM_FAST_BACKEND", "reference")
    assert lstm_fast.explain(module, X) == "reference: asked for"
    assert lstm_fast.explain(named, X) == "cpu: asked for"
    monkeypatch.setenv("LSTM_FAST_BACKEND", "")  # as a shell's unset variable is passed on
    assert dispatch.requested("auto") == "auto" and module(X)[0].shape == (4, 2, 5)
    monkeypatch.setenv("LSTM_FAST_BACKEND", "gpu")
    with pytest.raises(ValueError, match=r"LSTM_FAST_BACKEND should be one of auto, .*, got: 'gpu'"):
        module(X)


def test_an_unknown_name_is_refused_at_construction():
    with pytest.raises(
        ValueError, match="backend should be one of auto, persistent, cuda, triton, cpu, reference, got: 'fast'"
    ):
        lstm_fast.LSTM(3, 5, backend="fast")
    assert "backend='cpu'" in repr(lstm_fast.LSTMCell(3, 5, backend="cpu"))
    with pytest.raises(TypeError, match=r"module should be an lstm_fast.LSTM or LSTMCell, got: Linear"):
        lstm_fast.explain(nn.Linear(3, 5), X)


GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu_kernels(monkeypatch):
    """A machine whose GPU kernels serve everything, but for the persistent ones past 768 hidden units."""
    for name in ("persistent", "cuda", "triton"):
        monkeypatch.setattr(dispatch.KERNELS[name], "unavailable", lambda: None)
        monkeypatch.setattr(dispatch.KERNELS[name], "refuses", lambda device, dtype, hidden: None)
    monkeypatch.setattr(
        dispatch.KERNELS["persistent"],
        "refuses",
        lambda device, dtype, hidden: f"{hidden} hidden units don't fit" if hidden > 768 else None,
    )
    for name in ("crowded", "outweighed"):
        monkeypatch.setattr(dispatch.persistent, name, lambda *asked, plain=None: None)
    monkeypatch.setattr(dispatch.measured, "place", lambda device: "cuda 9.0")


def choose_on_gpu(hidden, backend="auto", batch=4, **call):
    call = {"proj_size": 0, "traced": False, "transformed": False, **call}
    return dispatch.choose(backend, GPU, torch.bfloat16, hidden, **call, kind="layer", shape=lambda: (8, batch))


def test_on_a_gpu_what_fits_is_persistent_and_the_rest_is_torchs(gpu_kernels):
    assert choose_on_gpu(768).backend == "persistent"
    assert choose_on_gpu(1024) == ("torch", "persistent: 1024 hidden units don't fit")
    assert "no projections" in choose_on_gpu(64, proj_size=3).reason
    with pytest.raises(RuntimeError, match='backend="persistent" cannot serve this call: 1024 hidden units'):
        choose_on_gpu(1024, backend="persistent")


def test_on_a_gpu_nobody_measured_large_batches_go_to_torch_by_estimate(gpu_kernels, monkeypatch):
    monkeypatch.setattr(
        dispatch.persistent, "outweighed", lambda *asked, plain: f"slow at {asked[2:]}" if asked[3] > 9 else None
    )
    assert choose_on_gpu(64, batch=9).backend == "persistent"
    assert choose_on_gpu(64, batch=10) == ("torch", "persistent: slow at (64, 10)")
    assert choose_on_gpu(64, "persistent", batch=10).backend == "persistent"
    found = ("cuda 9.0", "bfloat16", "layer", True, 8, 10, 64)
    monkeypatch.setattr(dispatch.measured, "covers", lambda call: call == found)
    assert choose_on_gpu(64, batch=10).backend == "persistent"
    assert choose_on_gpu(64, batch=11).backend == "torch"


@pytest.mark.parametrize("known", [False, True])
def test_on_a_gpu_batches_that_it_does_not_hold_go_to_torch(gpu_kernels, monkeypatch, known):
    monkeypatch.setattr(dispatch.measured, "covers", lambda call: known)
    monkeypatch.setattr(dispatch.persistent, "crowded", lambda *asked: "too many" if asked[3] > 9 else None)
    assert choose_on_gpu(64, batch=9).backend == "persistent"
    assert choose_on_gpu(64, batch=10) == ("torch", "persistent: too many")


def test_a_compiled_graph_on_a_gpu_takes_gate_kernels_before_the_reference(gpu_kernels, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert choose_on_gpu(768).backend == "persistent"
    backend, reason = choose_on_gpu(1024)
    assert backend == "cuda" and "1024 hidden units don't fit" in reason
    monkeypatch.setattr(dispatch.KERNELS["cuda"], "unavailable", lambda: "it was not built")
    assert choose_on_gpu(1024).backend == "triton"


def test_importing_leaves_the_compiler_alone():
    """It takes a second to import, and most programs never use it."""
    check = "import sys, lstm_fast; assert 'torch._dynamo' not in sys.modules and 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)
