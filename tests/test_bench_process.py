"""Processes of their own: each ends within its time, with its children."""

import signal
import subprocess
import time

import pytest

from lstm_fast.bench import process


def test_a_process_that_hangs_is_stopped():
    """With its children, which would hold its output open."""
    begun = time.monotonic()
    code, output = process.run(["sh", "-c", "sleep 60 & echo begun; wait"], 1)
    assert code is None and output == "begun\n" and time.monotonic() - begun < 30


def test_ctrl_c_stops_the_part_too(monkeypatch):
    started = []

    class Interrupted(subprocess.Popen):
        def communicate(self, *arguments, **options):
            if not started:
                started.append(self)
                raise KeyboardInterrupt
            return super().communicate(*arguments, **options)

    monkeypatch.setattr(process.subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        process.run(["sleep", "60"], 60)
    assert started[0].returncode == -signal.SIGKILL


def test_a_process_that_a_kill_does_not_end_is_left_behind(monkeypatch):
    """As one that waits inside the driver: here nothing is killed at all."""
    monkeypatch.setattr(process.os, "killpg", lambda *_: None)
    monkeypatch.setattr(process, "STUCK", 0.5)
    assert process.run(["sh", "-c", "echo begun; sleep 3; echo later"], 0.5) == (None, "begun\n")
