"""The translator's commands on input and places that can't serve: one sentence, before the work is done."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch

from lstm_fast.translate import commands
from lstm_fast.translate.checkpoint import save_model
from lstm_fast.translate.model import ModelConfig, Translator
from lstm_fast.translate.tokenizer import Tokenizer


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """An untrained one."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(["the rose is red", "la rose est rouge"], 300)
    config = ModelConfig(len(tokenizer), 16, 1, 1)
    save_model(tmp_path / "model.safetensors", Translator(config).state_dict(), config, tokenizer, {})
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object, stdin: bytes = b"", errors: str = "strict") -> int:
    """The exit status; ``stdin`` as Python opens it, with ``errors`` by the locale."""
    monkeypatch.setattr(sys, "argv", ["lstm-fast", *map(str, arguments)])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8", errors=errors))
    return commands.run()


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_input_that_is_not_utf_8_is_refused_by_its_line(model, monkeypatch, capsys, errors):
    stdin = b"the rose\n" * 2000 + b"\xff\xfe bad\n"  # more than is read at once
    assert run(monkeypatch, "translate", "--model", model, stdin=stdin, errors=errors) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err == "lstm-fast: standard input, line 2001: byte 0xff isn't UTF-8; expected UTF-8 text.\n"


def test_a_sentence_that_is_not_utf_8_is_refused_by_its_number(model, monkeypatch, capsys):
    assert run(monkeypatch, "translate", "--model", model, "rose", "ros\udce9") == 2
    assert capsys.readouterr().err == "lstm-fast: sentence 2: byte 0xe9 isn't UTF-8; expected UTF-8 text.\n"


def test_a_mark_of_byte_order_is_no_part_of_the_input(model, monkeypatch, capsys):
    told = []
    for mark in (b"", b"\xef\xbb\xbf"):
        assert run(monkeypatch, "translate", "--model", model, stdin=mark + b"the rose\n") == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1]


@pytest.mark.parametrize("sentence", ["", "\u200b"])
def test_there_is_no_picture_of_a_blank_sentence(model, monkeypatch, capsys, sentence):
    picture = model / "a.png"
    assert run(monkeypatch, "translate", "--model", model, sentence, "--attention", picture) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err == f"lstm-fast: Invalid value: --attention takes a sentence that isn't blank, got: {sentence!r}\n"
    assert not picture.exists()


@pytest.mark.parametrize(
    ("arguments", "option", "kind"),
    [
        (["evaluate", "--json"], "--json", "regular file"),
        (["translate", "rose", "--attention"], "--attention", "regular file"),
        (["train", "--out"], "--out", "folder"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    tmp_path, monkeypatch, capsys, arguments, option, kind
):
    for name in ("load_model", "train"):
        monkeypatch.setattr(commands, name, lambda *_: pytest.fail("the work began"))
    (tmp_path / "plain.txt").touch()
    wrong = [tmp_path / "plain.txt"] if kind == "folder" else [tmp_path, Path("/dev/full")]
    for place in [tmp_path / "plain.txt" / "deep" / "x", *wrong]:
        assert run(monkeypatch, *arguments, place) == 2
        error = f"lstm-fast: {option} should be a {kind} that can be written, got: {place}\n"
        assert capsys.readouterr().err == error
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert run(monkeypatch, *arguments, tmp_path / "new") == 2
    assert not (tmp_path / "new").exists()
