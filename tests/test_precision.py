"""fp32 products of GPU tensors: TF32 where torch lets cuDNN's recurrent layers use it; torch's own flags stay."""

from types import SimpleNamespace

import pytest
import torch

from lstm_fast import precision


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
    assert precision.rnn_tf32() is of_cudnn
    gpu = SimpleNamespace(is_cuda=True, dtype=torch.float32)
    with pytest.raises(ZeroDivisionError), precision.rnn_precision(gpu):
        assert matmul_precision() == ("tf32" if of_cudnn else "ieee") or matmul_precision() is of_cudnn
        raise ZeroDivisionError
    assert matmul_precision() == before and torch.backends.cuda.matmul.allow_tf32 is of_matmul
    for other in (SimpleNamespace(is_cuda=True, dtype=torch.bfloat16), torch.zeros(1)):
        with precision.rnn_precision(other):
            assert matmul_precision() == before


@pytest.mark.parametrize("of_matmul", [True, False])
@pytest.mark.parametrize("of_cudnn", [True, False])
def test_torch_before_precisions_had_names(of_cudnn, of_matmul, monkeypatch):
    """torch 2.8 has one switch for cuDNN and one for products."""
    monkeypatch.setattr(torch.backends, "cudnn", SimpleNamespace(allow_tf32=of_cudnn))
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(allow_tf32=of_matmul))
    assert precision.rnn_tf32() is of_cudnn
    with precision.rnn_precision(SimpleNamespace(is_cuda=True, dtype=torch.float32)):
        assert matmul_precision() is of_cudnn
    assert matmul_precision() is of_matmul


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="this torch has one switch a backend")
@pytest.mark.usefixtures("restore_precision")
def test_a_setting_for_all_of_torch_still_reaches_products_afterwards():
    before = torch.backends.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.rnn.fp32_precision = "none"  # inherited
        torch.backends.fp32_precision = "tf32"
        with precision.rnn_precision(SimpleNamespace(is_cuda=True, dtype=torch.float32)):
            assert matmul_precision() == "tf32"
        torch.backends.fp32_precision = "ieee"
        assert matmul_precision() == "ieee"
    finally:
        torch.backends.fp32_precision = before
