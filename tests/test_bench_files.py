"""Where the benchmark writes: nothing is lost without a word, and what can't be written is said at once."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from lstm_fast import files
from lstm_fast.bench import commands, memory, runner, training
from lstm_fast.bench.limits import Limits

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Ctrl-C before so many cases, none of which is really timed."""
    monkeypatch.setattr(runner, "measure", lambda *_: Limits({}, [(1, 1.0)], None))
    monkeypatch.setattr(memory, "startup", lambda *_: {})
    monkeypatch.setattr(runner, "time_case", lambda *_: None)

    def stop(number: int) -> None:
        def progress(done: int, *_: Any, **__: Any) -> None:
            if done == number:
                raise KeyboardInterrupt

        monkeypatch.setattr(commands.Progress, "update", lambda *_, completed, **__: progress(completed))

    return stop


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("done", [0, 2])
def test_a_stopped_run_says_what_holds_what(
    older: bool, done: int, stop_at: Callable[[int], None], command: Command
) -> None:
    if older:
        Path("run.json").write_text("older")
    stop_at(done)
    status, out, _ = command("bench", "--device", "cpu", "--seconds", 0, "--out", "run.json")
    assert status == 130
    said = {
        (False, 0): "Stopped before anything was measured.",
        (True, 0): "Stopped before anything was measured; run.json is as it was.",
        (False, 2): "Stopped; run.json holds what was measured.",
        (True, 2): "Stopped; run.json.part holds what was measured, and run.json is as it was.",
    }[older, done]
    assert said in out
    found = {path.name for path in Path().iterdir()}
    assert found == {name for name, there in (("run.json", older or done), ("run.json.part", older and done)) if there}
    assert not older or Path("run.json").read_text() == "older"


def test_a_run_takes_its_files_name_when_it_is_complete(tmp_path: Path) -> None:
    output = tmp_path / "run.json"
    output.write_text("older")
    files.write(files.unfinished(output), {"rows": []})
    assert output.read_text() == "older"
    files.finish(output)
    assert output.read_text() == '{\n "rows": []\n}\n' and list(tmp_path.iterdir()) == [output]


def test_a_failed_write_names_the_file_which_stays_as_it_was(tmp_path: Path, full_disk: Callable[[], Any]) -> None:
    output = tmp_path / "run.json"
    output.write_text("older")
    with full_disk(), pytest.raises(OSError) as caught:
        files.write(output, {"rows": [0] * 9000})
    assert caught.value.filename == str(output)
    assert output.read_text() == "older" and list(tmp_path.iterdir()) == [output]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link, real = tmp_path / "run.json", tmp_path / "there" / "real.json"
    link.symlink_to(real)
    for write in (files.write, lambda path, record: (files.write(files.unfinished(path), record), files.finish(path))):
        files.prepare(link)
        write(link, {})
        assert link.is_symlink() and real.read_text() == "{}\n"
        assert set(tmp_path.rglob("*")) == {link, real, real.parent}
        real.unlink()


@pytest.mark.parametrize("name", ["pipe", "folder", "plain/run.json"])
@pytest.mark.parametrize("arguments", [["--device", "cpu"], ["train"], ["tune"], ["tune", "record.json"]])
def test_an_output_that_cannot_be_written_is_said_at_once(
    name: str, arguments: list[str], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo("pipe")
    Path("folder").mkdir()
    Path("plain").touch()
    before = set(Path().rglob("*"))
    for module, measures in ((runner, "run"), (training, "run"), (commands.report, "load")):
        monkeypatch.setattr(module, measures, mock.Mock(side_effect=AssertionError("it was begun")))
    status, out, error = command("bench", *arguments, "--out", name)
    assert (status, out) == (2, "") and error.count("\n") == 1
    assert "--out should be a " in error and f"got: {name}" in error
    assert set(Path().rglob("*")) == before and Path("pipe").is_fifo()


def test_tuning_without_a_row_writes_nothing(command: Command) -> None:
    about = {"date": "2026", "commit": "0", "cpu": "A CPU", "torch": "2", "threads": 1, "grid": "g", "device": "cpu"}
    Path("run.json").write_text(json.dumps({**about, "skipped": {}, "rows": [], "failed": []}))
    status, out, error = command("bench", "tune", "run.json", "--out", "table.json")
    assert (status, out) == (2, "") and "a table needs quiet rows of ours against torch's" in error
    assert not Path("table.json").exists()


def test_a_list_may_have_spaces_and_the_same_twice() -> None:
    assert commands._among("torch, haste,torch", ("torch", "haste"), "--rivals") == ["torch", "haste"]
