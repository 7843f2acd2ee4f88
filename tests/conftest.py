"""Shared by all tests: where a GPU is needed, and what stands in for one."""

from __future__ import annotations

import io
import os
import resource
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from lstm_fast import cli, lstm, measured
from tests.quick_case import watched

GPU = torch.cuda.is_available()
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the Triton kernels are first imported
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts


@pytest.fixture(autouse=True)
def no_users_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests dispatch by the shipped table, whatever their machine was tuned to."""
    monkeypatch.setattr(measured, "users_table", lambda: Path(os.devnull))


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What each quick look at inference gave."""
    return watched(monkeypatch, lstm, "infer")


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What each quick look at a layer in training gave."""
    return watched(monkeypatch, lstm, "train")


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """Runs ``lstm-fast`` in an empty folder of its own: exit status, standard output, standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lstm-fast", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            cli.main()
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def full_disk() -> Callable[[], AbstractContextManager[None]]:
    """Within it no file grows beyond 4 KiB."""

    @contextmanager
    def limited() -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Backend "cuda" needs a GPU; "triton" and "persistent" run on one where there is one: ``-m gpu`` selects all."""
    for item in items:
        backend = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
        if backend == "cuda" or (backend in ("triton", "persistent") and GPU):
            item.add_marker(pytest.mark.gpu)
        if not GPU and item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="torch finds no NVIDIA GPU"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--failures-to", type=Path, help="a file for each failure as soon as it is known")


def pytest_configure(config: pytest.Config) -> None:
    to = config.getoption("--failures-to")
    if to is not None and not hasattr(config, "workerinput"):  # xdist's workers report to this process
        config.pluginmanager.register(_Failures(to))


class _Failures:
    """pytest itself prints them at its end, which a run that is stopped never reaches."""

    def __init__(self, to: Path) -> None:
        self.to = to

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            with self.to.open("a") as file:
                file.write(f"{report.nodeid} ({report.when})\n{report.longreprtext}\n\n")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """A fault on the card ends a process's use of it: xdist goes on with a new one, when the test's report is sent."""
    result = yield
    if GPU and item.get_closest_marker("gpu") and "PYTEST_XDIST_WORKER" in os.environ:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)
    return result
