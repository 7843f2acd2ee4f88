"""The command line of the translator."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from lstm_fast import cli, files
from lstm_fast.bench import commands as bench
from lstm_fast.bench.report import ReportError
from lstm_fast.files import OutputError
from lstm_fast.translate.checkpoint import MODEL_FILE, TRAINING_FILE, CheckpointError, load_model
from lstm_fast.translate.corpus import SHOWCASE, CorpusError, builtin, read_pairs
from lstm_fast.translate.plots import plot_attention
from lstm_fast.translate.progress import ProgressBar
from lstm_fast.translate.scoring import Scores, evaluate
from lstm_fast.translate.search import BEAM, translate
from lstm_fast.translate.tokenizer import VocabularyError
from lstm_fast.translate.training import TrainingConfig, resume, train

RUN = Path("runs/translator")
DEFAULT_MINUTES = 10.0

app = typer.Typer(
    help="Fused LSTM kernels, and an English-to-French translator trained on them.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(bench.app, name="bench")

Model = Annotated[Path, typer.Option(help="A checkpoint, or the folder that training wrote.")]
Beam = Annotated[int, typer.Option(help="Hypotheses kept in search; 1 is greedy.", min=1)]


def run() -> int:
    """The exit status: 0, 2 after bad input, 130 after Ctrl-C or SIGTERM; errors are one sentence on stderr."""
    usage_error: Any = typer.BadParameter.__base__  # click's UsageError, wherever this typer keeps click
    try:
        status = app(standalone_mode=False)
    except usage_error as error:
        return _fail(error.format_message())
    except (CheckpointError, CorpusError, VocabularyError, FloatingPointError, OutputError, ReportError) as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except (KeyboardInterrupt, typer.Abort):
        return 130
    return status if isinstance(status, int) else 0


def _fail(message: str) -> int:
    print(f"lstm-fast: {' '.join(message.split())}", file=sys.stderr)
    return 2


@app.command()
def info() -> None:
    """Which LSTM kernels can run here, and why the others can't."""
    print(cli.info())


@app.command("train")
def train_command(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint.")] = RUN,
    text: Annotated[
        str | None, typer.Option("--train", help="English<TAB>French file; else the built-in text.")
    ] = None,
    dev: Annotated[str | None, typer.Option(help="Pairs to choose the best weights by; else split off.")] = None,
    minutes: Annotated[
        float | None, typer.Option(help=f"Budget in minutes; {DEFAULT_MINUTES:g} if none is given.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Budget in steps of the optimiser.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Budget in passes over the text.")] = None,
    vocab_size: Annotated[int, typer.Option(help="Subwords of both languages, at most.")] = TrainingConfig.vocab_size,
    width: Annotated[int, typer.Option(help="Size of embeddings and layers.")] = TrainingConfig.width,
    encoder_layers: Annotated[int, typer.Option(help="Stacked, each both ways.")] = TrainingConfig.encoder_layers,
    decoder_layers: Annotated[int, typer.Option(help="Stacked.")] = TrainingConfig.decoder_layers,
    dropout: Annotated[float, typer.Option(help="Probability.")] = TrainingConfig.dropout,
    batch_tokens: Annotated[
        int, typer.Option(help="Subwords in a batch, at most; longer pairs are left out.")
    ] = TrainingConfig.batch_tokens,
    learning_rate: Annotated[float, typer.Option(help="At its peak.")] = TrainingConfig.learning_rate,
    seed: Annotated[int, typer.Option(help="Of weights, dropout and the order of batches.")] = TrainingConfig.seed,
    resume_run: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out, as it began.")] = False,
) -> None:
    """Train a translator. Ctrl-C and SIGTERM save the run; --resume goes on with it."""
    if resume_run:
        given = [
            p.opts[0]
            for p in context.command.params
            if cli.was_given(context, p.name) and p.name not in ("out", "resume_run")
        ]
        if given:
            raise typer.BadParameter(f"--resume takes all but --out from the run itself, got: {', '.join(given)}")
        _train(None, out)
        return
    budget = minutes if (minutes, steps, epochs) != (None, None, None) else DEFAULT_MINUTES
    try:
        config = TrainingConfig(
            train=text,
            dev=dev,
            minutes=budget,
            steps=steps,
            epochs=epochs,
            vocab_size=vocab_size,
            width=width,
            encoder_layers=encoder_layers,
            decoder_layers=decoder_layers,
            dropout=dropout,
            batch_tokens=batch_tokens,
            learning_rate=learning_rate,
            seed=seed,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    _train(config, out)


def _check_utf8(text: str, place: str) -> None:
    """Python reads bytes that aren't UTF-8 as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) & 0xFF
        raise CorpusError(f"{place}: byte 0x{byte:02x} isn't UTF-8; expected UTF-8 text.") from error


def _train(config: TrainingConfig | None, out: Path) -> dict[str, Any]:
    files.check_place("--out", "folder", out)
    with ProgressBar() as bar:
        try:
            summary = resume(out, bar) if config is None else train(config, out, bar)
        except KeyboardInterrupt:
            if (out / TRAINING_FILE).exists():
                bar.note(f"Stopped; `lstm-fast train --resume --out {out}` goes on.")
            raise
        rate = f"{summary['sentences_per_second']:.0f} sentences/s"
        bar.note(f"{summary['steps']} steps in {summary['seconds']:.0f} s, {rate}; the model is {out / MODEL_FILE}")
    return summary


@app.command("translate")
def translate_command(
    sentences: Annotated[list[str] | None, typer.Argument(help="English; else lines of standard input.")] = None,
    model: Model = RUN,
    beam: Beam = BEAM,
    attention: Annotated[Path | None, typer.Option(help="Write a picture of a single sentence's attention.")] = None,
) -> None:
    """Translate sentences, one a line."""
    texts = sentences or [
        line.rstrip("\n") for line in typer.get_text_stream("stdin", encoding="utf-8-sig", errors="surrogateescape")
    ]
    for number, text in enumerate(texts, 1):
        _check_utf8(text, f"sentence {number}" if sentences else f"standard input, line {number}")
    if attention is not None:
        if len(texts) != 1:
            raise typer.BadParameter(f"--attention takes one sentence, got: {len(texts)}")
        files.check_place("--attention", "regular file", attention)
    checkpoint = load_model(model)
    translations = translate(checkpoint.model, checkpoint.tokenizer, texts, beam)
    if attention is not None and not translations[0].source_pieces:
        raise typer.BadParameter(f"--attention takes a sentence that isn't blank, got: {texts[0]!r}")
    for translation in translations:
        print(translation.text)
    if attention is not None:
        plot_attention(translations[0], attention)


@app.command("evaluate")
def evaluate_command(
    model: Model = RUN,
    test: Annotated[
        str | None, typer.Option(help="English<TAB>French file; else the built-in text's test part.")
    ] = None,
    beam: Beam = BEAM,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write scores and the model's story here.")] = None,
) -> None:
    """Score translations with BLEU and chrF against references never trained on."""
    if json_file is not None:
        files.check_place("--json", "regular file", json_file)
    checkpoint = load_model(model)
    scores = evaluate(
        checkpoint.model, checkpoint.tokenizer, builtin().test if test is None else read_pairs(test), beam
    )
    _print_scores(scores)
    if json_file is not None:
        report = {"test": test or "built-in", "beam": beam, **asdict(scores), "training": checkpoint.training}
        files.write(json_file, report)


def _print_scores(scores: Scores) -> None:
    print(f"BLEU {scores.bleu:.2f}  {scores.bleu_signature}")
    print(f"chrF {scores.chrf:.2f}  {scores.chrf_signature}")
    print(f"on {scores.sentences} sentences")


PICTURED = "She picked a red rose."  # of SHOWCASE: French turns its last two words round


@app.command()
def demo(
    minutes: Annotated[float, typer.Option(help="Training time.")] = 3.0,
    out: Annotated[Path, typer.Option(help="Folder for all that it writes; replaced.")] = Path("demo"),
) -> None:
    """Train on the built-in text, score what was held out, and show what the translator has learnt."""
    for name in (MODEL_FILE, TRAINING_FILE):
        (out / name).unlink(missing_ok=True)
    _train(TrainingConfig(minutes=minutes), out)
    checkpoint = load_model(out)
    print("\nHeld-out sentences, whose word combinations were never trained on:")
    _print_scores(evaluate(checkpoint.model, checkpoint.tokenizer, builtin().test))
    print()
    translations = translate(checkpoint.model, checkpoint.tokenizer, SHOWCASE)
    width = max(map(len, SHOWCASE))
    for translation in translations:
        print(f"{translation.source:<{width}}  {translation.text}")
    picture = out / "attention.png"
    plot_attention(translations[SHOWCASE.index(PICTURED)], picture)
    print(f"\nattention of {PICTURED!r}: {picture}")
    print(f"the model: {out / MODEL_FILE}")
    print(f'more: lstm-fast translate --model {out} "She picked a rose."')
