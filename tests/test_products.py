"""Products over all steps against fp64, on both sides of the size where oneDNN takes over."""

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
