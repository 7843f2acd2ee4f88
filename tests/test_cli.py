"""The command: what it prints, its exit status, and that errors are one sentence and touch nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import lstm_fast
from lstm_fast import cli
from lstm_fast.translate import commands
from lstm_fast.translate.checkpoint import load_model, load_tensors
from lstm_fast.translate.corpus import Pair, Splits

PAIRS = [
    ("I rose from the ashes.", "Je me suis relevé des cendres."),
    ("The rose is red.", "La rose est rouge."),
    ("She left the room.", "Elle a quitté la pièce."),
    ("Turn left here.", "Tournez à gauche ici."),
]
SMALL = "--vocab-size 310 --width 16 --encoder-layers 1 --decoder-layers 1 --batch-tokens 30".split()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "pairs.tsv"
    path.write_text("".join(f"{english}\t{french}\n" for english, french in PAIRS), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def run_folder(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "translator"
    argv, sys.argv = sys.argv, ["lstm-fast", "train", "--train", text, "--dev", text, "--steps", "4", "--out", str(out)]
    sys.argv += SMALL
    with pytest.raises(SystemExit) as end:
        cli.main()
    sys.argv = argv
    assert end.value.code == 0
    return out


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_info_names_every_backend_and_why(command):
    status, out, _ = command("info")
    assert status == 0
    assert lstm_fast.__version__ in out
    for name, backend in lstm_fast.backends().items():
        assert f"{name:<10} {'runs here' if backend.available else 'cannot run here'}: {backend.detail}" in out


def test_info_says_why_the_extension_is_missing_and_what_builds_it():
    code = "import sys; sys.modules['lstm_fast._C'] = None; from lstm_fast.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "info"], capture_output=True, text=True, timeout=60)
    why = "lstm_fast._C can't be loaded: import of lstm_fast._C halted; None in sys.modules; `pip install .` in"
    for name in ("persistent", "cuda", "cpu"):
        assert f"{name:<10} cannot run here: {why} the source of lstm_fast builds it" in done.stdout


@pytest.mark.parametrize("missing", ["typer", "sentencepiece", "matplotlib"])
def test_info_needs_torch_alone_and_the_rest_names_its_extra(missing):
    code = f"import sys; sys.modules[{missing!r}] = None; from lstm_fast.cli import main; main()"
    if missing == "typer":
        done = subprocess.run([sys.executable, "-c", code, "info"], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        assert "reference" in done.stdout
    done = subprocess.run([sys.executable, "-c", code, "train"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == f"This command needs {missing}: pip install '.[translate]' in the source of lstm_fast\n"


def test_a_letter_that_the_encoding_lacks_is_replaced(tmp_path):
    code = "import lstm_fast.cli as cli; cli.info = lambda: '2.00\u00d7'; cli.main()"
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-c", code, "info"], capture_output=True, text=True, env=ascii_only, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "2.00?\n", "")


def test_ctrl_c_while_it_starts_is_no_traceback(command, monkeypatch):
    class Stop:
        def find_spec(self, name, *_):
            if name == "lstm_fast.translate.commands":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "lstm_fast.translate.commands")
    monkeypatch.setattr(sys, "meta_path", [Stop(), *sys.meta_path])
    assert command("demo") == (130, "", "")


def test_ctrl_c_in_info_is_no_traceback(command, monkeypatch):
    def stopped():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "info", stopped)
    assert command("info") == (130, "", "")


def test_sigterm_ends_a_command_as_ctrl_c_does(command, monkeypatch):
    def stopped(*_):
        signal.getsignal(signal.SIGTERM)(signal.SIGTERM, None)

    monkeypatch.setattr(commands.bench.runner, "run", stopped)
    status, out, _ = command("bench", "--device", "cpu", "--out", "run.json")
    assert status == 130 and "Stopped before anything was measured." in out


def test_training_says_which_kernels_served_and_where_the_model_is(command, text):
    status, out, err = command("train", "--train", text, "--dev", text, "--steps", 3, "--out", "here", *SMALL)
    assert (status, err) == (0, "")
    assert "LSTM on " in out
    assert "dev BLEU" in out
    assert "the model is here/model.safetensors" in out
    assert sorted(files(Path("here"))) == ["model.safetensors", "training.safetensors"]


def test_translations_come_one_a_line(command, run_folder):
    status, out, err = command("translate", "--model", run_folder, "The rose is red.", "She left.")
    assert (status, err) == (0, "")
    assert out.count("\n") == 2
    from_stdin = command("translate", "--model", run_folder, stdin="The rose is red.\nShe left.\n")
    assert from_stdin == (status, out, err)
    blank = command("translate", "--model", run_folder, stdin="\nThe rose is red.\n")[1]
    assert blank.splitlines()[0] == "" and blank.splitlines()[1] == out.splitlines()[0]


def test_a_picture_of_attention(command, run_folder):
    status, _, _ = command("translate", "--model", run_folder, "--attention", "a/b.png", "The rose is red.")
    assert status == 0
    assert Path("a/b.png").read_bytes().startswith(b"\x89PNG")


def test_evaluation_prints_and_writes_scores_with_their_signatures(command, run_folder, text):
    status, out, err = command("evaluate", "--model", run_folder, "--test", text, "--json", "scores/all.json")
    assert (status, err) == (0, "")
    report = json.loads(Path("scores/all.json").read_text(encoding="utf-8"))
    assert f"BLEU {report['bleu']:.2f}  {report['bleu_signature']}" in out
    assert f"chrF {report['chrf']:.2f}  {report['chrf_signature']}" in out
    assert report["sentences"] == len(PAIRS)
    assert "nrefs:1|case:mixed" in report["bleu_signature"]
    assert report["training"]["steps"] <= 4
    assert {"seconds", "sentences_per_second", "cpu", "threads", "torch", "lstm"} <= report["training"].keys()


def test_the_demo_shows_scores_translations_and_a_picture_twice_in_a_row(command, monkeypatch):
    pairs = [Pair(english, french) for english, french in PAIRS]
    for module in ("training", "commands"):
        monkeypatch.setattr(f"lstm_fast.translate.{module}.builtin", lambda: Splits(pairs, pairs, pairs))
    for _ in range(2):
        status, out, err = command("demo", "--minutes", 0.02)
        assert (status, err) == (0, "")
        assert "BLEU" in out and "nrefs:1|case:mixed" in out
        for sentence in commands.SHOWCASE:
            assert sentence in out
        assert Path("demo/attention.png").exists()
        assert "demo/model.safetensors" in out


ERRORS = {
    "no command": ([], "Missing command"),
    "unknown command": (["nonsense"], "No such command 'nonsense'"),
    "unknown option": (["train", "--nonsense"], "No such option: --nonsense"),
    "not a number": (["train", "--minutes", "ten"], "'--minutes'"),
    "no budget": (["train", "--steps", "0"], "steps should be above 0, got: 0"),
    "two budgets": (["train", "--steps", "2", "--epochs", "1"], "got: steps and epochs"),
    "odd width": (["train", "--width", "7"], "width should be even"),
    "no rate": (["train", "--learning-rate", "0"], "learning_rate should be above 0, got: 0.0"),
    "few subwords": (
        ["train", "--train", "TEXT", "--vocab-size", "5"],
        "vocab_size should be larger for this text, got: 5",
    ),
    "no text": (["train", "--train", "nowhere.tsv"], "nowhere.tsv"),
    "text is a folder": (["train", "--train", "."], "."),
    "text without tabs": (["train", "--train", "plain.txt"], "plain.txt"),
    "text in latin-1": (["train", "--train", "latin.tsv"], "latin.tsv"),
    "out is a file": (["train", "--train", "TEXT", "--steps", "2", "--out", "plain.txt", *SMALL], "plain.txt"),
    "run in the way": (["train", "--train", "TEXT", "--out", "RUN"], "holds a trained model already"),
    "nothing to resume": (["train", "--resume", "--out", "empty"], "there is no checkpoint at empty"),
    "resume otherwise": (["train", "--resume", "--out", "RUN", "--width", "8"], "got: --width"),
    "no model": (["translate", "hello"], "there is no checkpoint at runs/translator"),
    "model is text": (["translate", "--model", "plain.txt", "hello"], "plain.txt is not a checkpoint"),
    "model cut short": (["evaluate", "--model", "short"], "is not a checkpoint, or it is cut short"),
    "training state": (["evaluate", "--model", "RUN/training.safetensors"], "where 'model' is expected"),
    "beam of none": (["translate", "--model", "RUN", "--beam", "0", "hello"], "'--beam'"),
    "two pictures": (["translate", "--model", "RUN", "--attention", "a.png", "a", "b"], "takes one sentence, got: 2"),
    "no test": (["evaluate", "--model", "RUN", "--test", "nowhere.tsv", "--json", "scores.json"], "nowhere.tsv"),
}


@pytest.mark.parametrize(("arguments", "message"), ERRORS.values(), ids=list(ERRORS))
def test_errors_are_one_sentence_exit_2_and_touch_nothing(command, run_folder, text, arguments, message):
    Path("plain.txt").write_text("no tab here\n", encoding="utf-8")
    Path("latin.tsv").write_bytes("a\té\n".encode("latin-1"))
    Path("short").write_bytes((run_folder / "model.safetensors").read_bytes()[:1000])
    here, there = files(Path()), files(run_folder)
    arguments = [a.replace("TEXT", text).replace("RUN", str(run_folder)) for a in arguments]
    status, out, err = command(*arguments)
    assert status == 2
    assert out == ""
    assert err.startswith("lstm-fast: ") and err.count("\n") == 1
    assert message in err
    assert (files(Path()), files(run_folder)) == (here, there)


@pytest.mark.skipif(os.name != "posix", reason="Ctrl-C is sent as a signal of POSIX")
def test_ctrl_c_leaves_a_checkpoint_and_resume_goes_on(text, tmp_path, command):
    out = tmp_path / "run"
    code = (
        "import sys; from lstm_fast.translate.progress import ProgressBar; from lstm_fast.cli import main\n"
        "ProgressBar.step = lambda *a: print('step', flush=True)\n"
        "main()"
    )
    arguments = ["train", "--train", text, "--dev", text, "--steps", "400", "--out", out, *SMALL]
    root = Path(lstm_fast.__file__).parents[1]
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments], cwd=root, stdout=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            if line == "step\n":
                process.send_signal(signal.SIGINT)
                break
        rest = process.stdout.read()
    assert process.returncode == 130
    assert f"`lstm-fast train --resume --out {out}` goes on" in rest
    steps = load_tensors(out / "training.safetensors", "training")[1]["step"]
    assert 0 < steps < 400
    assert load_model(out).training["steps"] <= steps
    assert sorted(files(out)) == ["model.safetensors", "training.safetensors"]
    status, told, err = command("train", "--resume", "--out", out)
    assert (status, err) == (0, "")
    assert "400 steps" in told
    assert load_tensors(out / "training.safetensors", "training")[1]["step"] == 400
