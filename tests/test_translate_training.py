"""Training: it learns, it can be interrupted and goes on bit for bit, and bad checkpoints are told apart."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lstm_fast.translate import training
from lstm_fast.translate.checkpoint import CheckpointError, load_model, load_tensors, save_tensors
from lstm_fast.translate.corpus import CorpusError, read_pairs
from lstm_fast.translate.search import translate
from lstm_fast.translate.training import TrainingConfig, resume, train

PAIRS = [
    ("I rose from the ashes.", "Je me suis relevé des cendres."),
    ("The rose is red.", "La rose est rouge."),
    ("She left the room.", "Elle a quitté la pièce."),
    ("Turn left here.", "Tournez à gauche ici."),
    ("He saw an old house.", "Il a vu une vieille maison."),
    ("The saw is on the table.", "La scie est sur la table."),
    ("I can open the can.", "Je peux ouvrir la boîte."),
    ("We do not eat apples.", "Nous ne mangeons pas de pommes."),
]
SMALL = {"vocab_size": 320, "width": 16, "encoder_layers": 2, "decoder_layers": 2, "batch_tokens": 40}


class Silent:
    """A Reporter that presses Ctrl-C, or sends ``number``, when the run has taken ``stop_after`` steps."""

    def __init__(self, stop_after: int = 0, number: signal.Signals = signal.SIGINT) -> None:
        self.steps, self.stop_after, self.number = 0, stop_after, number
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def step(self, progress: float, loss: float, sentences_per_second: float) -> None:
        self.steps += 1
        if self.steps == self.stop_after:
            signal.raise_signal(self.number)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "pairs.tsv"
    path.write_text("".join(f"{english}\t{french}\n" for english, french in PAIRS), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def config(text: Path) -> TrainingConfig:
    return TrainingConfig(str(text), str(text), steps=20, **SMALL)


@pytest.fixture(scope="module")
def finished(config: TrainingConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    out = tmp_path_factory.mktemp("finished") / "run"
    train(config, out, Silent())
    return out


def test_a_budget_that_loading_has_spent_still_makes_a_model(config: TrainingConfig, tmp_path: Path) -> None:
    summary = train(replace(config, steps=None, minutes=1e-9), tmp_path, Silent())
    assert summary["steps"] == 1
    load_model(tmp_path)


def assert_same_run(a: Path, b: Path) -> None:
    for name in ("model.safetensors", "training.safetensors"):
        ours, theirs = load_file(a / name), load_file(b / name)
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            assert torch.equal(tensor, theirs[key]), f"{name}: {key}"


@pytest.mark.parametrize("stops", [(10,), (1, 2, 16)], ids=["once", "three times"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(config, finished, tmp_path, stops):
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run", Silent(stops[0]))
    for stop in stops[1:]:
        torch.manual_seed(stop)  # the random state is the run's, not the process's
        with pytest.raises(KeyboardInterrupt):
            resume(tmp_path / "run", Silent(stop))
    torch.manual_seed(99)
    summary = resume(tmp_path / "run", Silent())
    assert summary["steps"] == 20
    assert_same_run(tmp_path / "run", finished)


def test_sigterm_saves_a_run_as_ctrl_c_does(config, finished, tmp_path):
    def unseen(*_):
        pytest.fail("the run didn't see it")

    before = signal.signal(signal.SIGTERM, unseen)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "run", Silent(3, signal.SIGTERM))
        assert signal.getsignal(signal.SIGTERM) is unseen
    finally:
        signal.signal(signal.SIGTERM, before)
    assert load_tensors(tmp_path / "run" / "training.safetensors", "training")[1]["step"] == 3
    resume(tmp_path / "run", Silent())
    assert_same_run(tmp_path / "run", finished)


def test_ctrl_c_ends_an_evaluation_which_the_resumed_run_does(config, finished, tmp_path, monkeypatch):
    def interrupted(*arguments, beam):
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the evaluation went on")

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "evaluate", interrupted)
        train(config, tmp_path / "run", Silent())
    load_model(tmp_path / "run")
    resume(tmp_path / "run", Silent())
    assert_same_run(tmp_path / "run", finished)


@pytest.mark.parametrize("name", ["save_model", "save_tensors"])
def test_ctrl_c_twice_amid_a_save_leaves_a_whole_run(config, finished, tmp_path, monkeypatch, name):
    save = getattr(training, name)

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        save(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, name, interrupted)
        train(config, tmp_path / "run", Silent())
    load_model(tmp_path / "run")
    resume(tmp_path / "run", Silent())
    assert_same_run(tmp_path / "run", finished)


def test_pairs_longer_than_a_batch_are_left_out_and_counted(config, text, tmp_path):
    long = tmp_path / "long.tsv"
    long.write_text(text.read_text(encoding="utf-8") + "word " * 100 + "\t" + "mot " * 100 + "\n", encoding="utf-8")
    told = []
    for train_file, dev_file in ((long, text), (text, long)):
        reporter = Silent()
        train(replace(config, train=str(train_file), dev=str(dev_file), steps=1), tmp_path / train_file.stem, reporter)
        told += [note for note in reporter.notes if "left out" in note]
    assert told == [
        "left out for more than 40 subwords (--batch-tokens): 1 training pairs and 0 dev pairs",
        "left out for more than 40 subwords (--batch-tokens): 0 training pairs and 1 dev pairs",
    ]
    with pytest.raises(CorpusError, match=r"batch_tokens should be at least \d+ for any training pair to fit, got: 3"):
        train(replace(config, batch_tokens=3), tmp_path / "none", Silent())


def test_a_batch_of_dev_is_bounded(config, tmp_path, monkeypatch):
    dev = tmp_path / "dev.tsv"
    lines = [f"{'red ' * words}{i}\t{'rouge ' * words}{i}\n" for i in range(30) for words in (2, 100)]
    dev.write_text("".join(lines), encoding="utf-8")
    sizes, loss = [], training.smoothed_loss
    monkeypatch.setattr(
        training,
        "smoothed_loss",
        lambda model, batch, smoothing: (
            sizes.append((model.training, *batch.target.shape)) or loss(model, batch, smoothing)
        ),
    )
    train(replace(config, dev=str(dev), batch_tokens=2000, steps=1), tmp_path / "run", Silent())
    rows, widths = zip(*(size for learning, *size in sizes if not learning), strict=True)
    assert sum(rows) == 60 and max(widths) > 100
    assert all(n * (t - 1) <= training.DEV_TOKENS for n, t in zip(rows, widths, strict=True))


def test_seeds_decide(config, finished, tmp_path):
    train(config, tmp_path / "same", Silent())
    assert_same_run(tmp_path / "same", finished)
    train(replace(config, seed=1), tmp_path / "other", Silent())
    weights = [load_file(path / "model.safetensors")["embedding.weight"] for path in (finished, tmp_path / "other")]
    assert not torch.equal(*weights)


def test_a_finished_run_has_nothing_left_to_do(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    reporter = Silent()
    resume(run, reporter)
    assert reporter.steps == 0
    assert_same_run(run, finished)


def test_eight_sentences_are_learnt_by_heart(text, tmp_path):
    sizes = {**SMALL, "width": 64, "dropout": 0.0, "learning_rate": 5e-3}
    config = TrainingConfig(str(text), str(text), steps=500, **sizes)
    summary = train(config, tmp_path / "run", Silent())
    checkpoint = load_model(tmp_path / "run")
    found = translate(checkpoint.model, checkpoint.tokenizer, [english for english, _ in PAIRS])
    assert [translation.text for translation in found] == [french for _, french in PAIRS]
    assert summary["dev_bleu"] == pytest.approx(100)
    assert checkpoint.training["steps"] <= 500
    assert checkpoint.training["lstm"].split(":")[0] in ("cpu", "cuda", "triton", "reference", "torch")


def test_epochs_are_planned_one_at_a_time_and_are_as_many_steps(config, tmp_path, monkeypatch):
    planned, plan = [], training.plan_epoch
    monkeypatch.setattr(training, "plan_epoch", lambda *arguments: planned.append(arguments[-1]) or plan(*arguments))
    epochs = replace(config, steps=None, epochs=4)
    with pytest.raises(KeyboardInterrupt):
        train(epochs, tmp_path / "epochs", Silent(1))
    assert planned == [0]
    with pytest.raises(KeyboardInterrupt):
        resume(tmp_path / "epochs", Silent(6))
    steps = resume(tmp_path / "epochs", Silent())["steps"]
    assert steps % 4 == 0 and planned[-1] == 3
    train(replace(config, steps=steps), tmp_path / "steps", Silent())
    assert_same_run(tmp_path / "epochs", tmp_path / "steps")


def test_epochs_and_minutes_are_budgets_too(config, tmp_path):
    plan_length = 3  # eight pairs of at most eleven subwords in batches of 40
    summary = train(replace(config, steps=None, epochs=2), tmp_path / "epochs", Silent())
    assert summary["steps"] % 2 == 0
    assert summary["steps"] >= 2 * plan_length
    summary = train(replace(config, steps=None, minutes=0.02), tmp_path / "minutes", Silent())
    assert summary["steps"] > 0
    assert summary["seconds"] >= 1.2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": None}, "one of minutes, steps and epochs should be given, got: none"),
        ({"minutes": 1.0}, "one of minutes, steps and epochs should be given, got: minutes and steps"),
        ({"steps": 0}, "steps should be above 0, got: 0"),
        ({"learning_rate": float("nan")}, "learning_rate should be above 0, got: nan"),
        ({"batch_tokens": -1}, "batch_tokens should be above 0, got: -1"),
        ({"width": 7}, "width should be even"),
        ({"seed": 2**64}, r"seed should be from -2\*\*63 to 2\*\*64 - 1, got: 18446744073709551616"),
    ],
)
def test_impossible_configurations_are_refused(config, change, message):
    with pytest.raises(ValueError, match=message):
        replace(config, **change)


@pytest.mark.parametrize("seed", [-(2**63), 2**64 - 1])
def test_the_widest_seeds_serve(config, tmp_path, seed):
    train(replace(config, seed=seed, steps=1), tmp_path, Silent())


def test_a_diverging_run_says_so(config, tmp_path):
    with pytest.raises(FloatingPointError, match="try a lower --learning-rate"):
        train(replace(config, learning_rate=1e30), tmp_path / "run", Silent())


def test_a_folder_that_holds_a_run_is_left_alone(config, finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    with pytest.raises(CheckpointError, match="holds a trained model already"):
        train(config, run, Silent())
    assert_same_run(run, finished)


def test_a_run_is_resumed_from_another_folder(config, text, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(text.parent)
    with pytest.raises(KeyboardInterrupt):
        train(replace(config, train=text.name, dev=text.name), tmp_path / "run", Silent(3))
    monkeypatch.chdir(tmp_path)
    resume(Path("run"), Silent())
    assert_same_run(tmp_path / "run", finished)


def test_a_changed_text_is_not_trained_on(config, text, tmp_path):
    changed = shutil.copy(text, tmp_path / "pairs.tsv")
    with pytest.raises(KeyboardInterrupt):
        train(replace(config, train=str(changed)), tmp_path / "run", Silent(3))
    before = (tmp_path / "run" / "training.safetensors").read_bytes()
    with open(changed, "a", encoding="utf-8") as file:
        file.write("one more\tun de plus\n")
    with pytest.raises(CheckpointError, match="has changed since"):
        resume(tmp_path / "run", Silent())
    Path(changed).unlink()
    with pytest.raises(CorpusError, match=r"pairs\.tsv"):
        resume(tmp_path / "run", Silent())
    assert (tmp_path / "run" / "training.safetensors").read_bytes() == before


@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors"])
@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 100, 0.1, 0.5, 0.999, -1])
def test_a_file_cut_short_is_refused(finished, tmp_path, name, size):
    data = (finished / name).read_bytes()
    run = shutil.copytree(finished, tmp_path / "run")
    (run / name).write_bytes(data[: int(size * len(data)) if 0 < size < 1 else size])
    with pytest.raises(CheckpointError, match=rf"{name} is not a checkpoint, or it is cut short or damaged: \S"):
        resume(run, Silent()) if name.startswith("training") else load_model(run)


def _header(path: Path, change: dict[str, str]) -> None:
    """Rewrites a checkpoint with other metadata."""
    tensors, length = load_file(path), int.from_bytes(path.read_bytes()[:8], "little")
    metadata = json.loads(path.read_bytes()[8 : 8 + length])["__metadata__"]
    save_file(tensors, path, {**metadata, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "another"}, "not a checkpoint of this translator"),
        ({"version": "7"}, "is a checkpoint of version 7; this lstm_fast reads version 1"),
        ({"kind": "training"}, "kind 'training', where 'model' is expected"),
        ({"about": "{"}, "cut short or damaged"),
        ({"about": "{}"}, "holds another model than its configuration says"),
        ({"about": '{"config": {"vocab_size": 5}, "training": {}}'}, "holds another model than its configuration says"),
        ({"about": '{"config": {"cells": 5}, "training": {}}'}, "holds another model than its configuration says"),
    ],
)
def test_a_checkpoint_of_another_kind_is_refused(finished, tmp_path, change, message):
    path = Path(shutil.copy(finished / "model.safetensors", tmp_path))
    _header(path, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_model_without_its_story_is_refused(finished, tmp_path):
    path = Path(shutil.copy(finished / "model.safetensors", tmp_path))
    _header(path, {"about": json.dumps({"config": asdict(load_model(path).model.config)})})
    with pytest.raises(CheckpointError, match="holds another model than its configuration says: 'training'"):
        load_model(path)


def test_a_model_alone_cannot_be_resumed(config, finished, tmp_path):
    shutil.copy(finished / "model.safetensors", tmp_path)
    with pytest.raises(CheckpointError, match=r"holds a model but no training\.safetensors: .* choose another --out"):
        resume(tmp_path, Silent())
    with pytest.raises(CheckpointError, match=r"holds a trained model already: choose another --out$"):
        train(config, tmp_path, Silent())


def test_other_files_are_refused(finished, tmp_path, text):
    with pytest.raises(CheckpointError, match="there is no checkpoint at"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="there is no checkpoint at"):
        resume(tmp_path, Silent())
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        load_model(text)
    save_file({"x": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(CheckpointError, match="not a checkpoint of this translator"):
        load_model(tmp_path / "foreign.safetensors")
    with pytest.raises(CheckpointError, match="kind 'training', where 'model' is expected"):
        load_model(finished / "training.safetensors")


def test_a_model_translates_alike_after_a_round_trip(finished):
    first, again = load_model(finished), load_model(finished / "model.safetensors")
    texts = [pair.english for pair in read_pairs(first.training["config"]["train"])]
    a, b = (translate(c.model, c.tokenizer, texts) for c in (first, again))
    assert [t.text for t in a] == [t.text for t in b]
    assert not first.model.training


def test_a_failed_write_leaves_the_checkpoint_that_was_there(finished, tmp_path, full_disk):
    run = shutil.copytree(finished, tmp_path / "run")
    tensors, about = load_tensors(run / "model.safetensors", "model")
    with full_disk(), pytest.raises(CheckpointError, match=r"model\.safetensors can't be written: .*File too large"):
        save_tensors(run / "model.safetensors", "model", tensors, about)
    assert_same_run(run, finished)
    assert sorted(path.name for path in run.iterdir()) == ["model.safetensors", "training.safetensors"]
