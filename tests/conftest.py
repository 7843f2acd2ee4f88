"""Shared by all tests: where a GPU is needed, and what stands in for one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from lstm_fast import measured

GPU = torch.cuda.is_available()
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the Triton kernels are first imported
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts


@pytest.fixture(autouse=True)
def no_users_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests dispatch by the shipped table, whatever their machine was tuned to."""
    monkeypatch.setattr(measured, "users_table", lambda: Path(os.devnull))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Backend "cuda" needs a GPU; "triton" and "persistent" run on one where there is one: ``-m gpu`` selects all."""
    for item in items:
        backend = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
        if backend == "cuda" or (backend in ("triton", "persistent") and GPU):
            item.add_marker(pytest.mark.gpu)
        if not GPU and item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="torch finds no NVIDIA GPU"))
