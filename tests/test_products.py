"""Products over all steps against fp64, on both sides of the size where oneDNN takes over; and TF32 on a GPU."""

from types import SimpleNamespace

import pytest
import torch

from lstm_fast import products


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("rows, k, columns", [(1, 3, 5), (7, 33, 100), (300, 128, 512)])
def test_linear(rows, k, columns, strided, bias):
    torch.manual_seed(0)
    x = torch.randn(k, rows).t() if strided else torch.randn(rows, k)
    w = torch.randn(k, columns).t() if strided else torch.randn(columns, k)
    b = torch.randn(columns) if bias else None
    exact = x.double() @ w.double().t() + (b.double() if bias else 0.0)
    error = (products.linear(x, w, b).double() - exact).norm() / exact.norm()
    assert error < 1e-6


@pytest.mark.parametrize("rows", [1, 127, 128, 129, 5000])
def test_long_sums_are_as_exact_as_torch(rows):
    torch.manual_seed(0)
    a, b = torch.rand(rows, 96), torch.rand(rows, 160)  # positive: a long sum's roundings add up
    exact = a.double().t() @ b.double()
    ours, theirs = (
        ((t.double() - exact).norm() / exact.norm()).item() for t in (products.sum_of_outer(a, b), a.t() @ b)
    )
    assert ours <= 2 * theirs + torch.finfo(torch.float32).eps


def matmul_precision() -> object:
    """What torch.mm may do with fp32 on a GPU, as the torch at hand says it."""
    matmul = torch.backends.cuda.matmul
    return matmul.fp32_precision if hasattr(matmul, "fp32_precision") else matmul.allow_tf32


@pytest.fixture
def restore_precision():
    flags = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [flag.allow_tf32 for flag in flags]
    yield
    for flag, value in zip(flags, before, strict=True):
        flag.allow_tf32 = value


@pytest.mark.parametrize("of_matmul", [True, False])
@pytest.mark.parametrize("of_cudnn", [True, False])
@pytest.mark.usefixtures("restore_precision")
def test_products_on_a_gpu_follow_cudnn_and_leave_torch_as_it_was(of_cudnn, of_matmul):
    torch.backends.cudnn.allow_tf32 = of_cudnn
    torch.backends.cuda.matmul.allow_tf32 = of_matmul
    before = matmul_precision()
    assert products.rnn_tf32() is of_cudnn
    gpu = SimpleNamespace(is_cuda=True, dtype=torch.float32)
    with pytest.raises(ZeroDivisionError), products.rnn_precision(gpu):
        assert matmul_precision() == ("tf32" if of_cudnn else "ieee") or matmul_precision() is of_cudnn
        raise ZeroDivisionError
    assert matmul_precision() == before and torch.backends.cuda.matmul.allow_tf32 is of_matmul
    for other in (SimpleNamespace(is_cuda=True, dtype=torch.bfloat16), torch.zeros(1)):
        with products.rnn_precision(other):
            assert matmul_precision() == before
