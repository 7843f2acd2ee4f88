"""Training: from pairs of sentences to a checkpoint, within a budget of minutes, steps or epochs.

A run can be interrupted at any time. What it needs to go on (weights, averages, optimiser, random state, place in the
data) is one file, and the run that goes on is the run that was never interrupted: bit for bit, on the same machine with
a budget of steps or epochs.
"""

from __future__ import annotations

import copy
import hashlib
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from lstm_fast import explain
from lstm_fast.environment import environment
from lstm_fast.translate.batches import Batch, Example, collate, cut, padded, plan_epoch
from lstm_fast.translate.checkpoint import (
    MODEL_FILE,
    TRAINING_FILE,
    CheckpointError,
    bytes_tensor,
    load_tensors,
    save_model,
    save_tensors,
    tensor_bytes,
)
from lstm_fast.translate.corpus import CorpusError, Pair, Splits, builtin, group_references, load_splits
from lstm_fast.translate.loss import linear_cross_entropy
from lstm_fast.translate.model import ModelConfig, Translator
from lstm_fast.translate.scoring import evaluate
from lstm_fast.translate.tokenizer import PAD, Tokenizer

WARM_UP = 0.05  # of the budget; the rate then falls linearly to zero
SMOOTHING = 0.1  # Szegedy et al. 2016
CLIP = 1.0  # norm of all gradients
AVERAGING = 0.995  # decay of the averaged weights at each step, less in the first ones
EVALUATIONS = 10  # on dev, evenly over the budget
DEV_SENTENCES = 400
DEV_BATCH, DEV_TOKENS = 50, 5000  # pairs, and their padded subwords


@dataclass(frozen=True)
class TrainingConfig:
    """All that decides a run.

    Attributes:
        train, dev: ``English<TAB>French`` files; train None for the built-in text, dev None to split one off.
        minutes, steps, epochs: the budget; one of them.
        vocab_size: subwords, at most.
        batch_tokens: padded subwords of a batch, in either language, at most; longer pairs are left out, of dev too.
        learning_rate: of AdamW, at its peak.
        Others: see ModelConfig.
    """

    train: str | None = None
    dev: str | None = None
    minutes: float | None = None
    steps: int | None = None
    epochs: int | None = None
    vocab_size: int = 6000
    width: int = 256
    encoder_layers: int = 2
    decoder_layers: int = 2
    dropout: float = 0.1
    batch_tokens: int = 800
    learning_rate: float = 2e-3
    seed: int = 0

    def __post_init__(self) -> None:
        budget = [name for name in ("minutes", "steps", "epochs") if getattr(self, name) is not None]
        if len(budget) != 1:
            raise ValueError(f"one of minutes, steps and epochs should be given, got: {' and '.join(budget) or 'none'}")
        for name in (*budget, "batch_tokens", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} should be above 0, got: {getattr(self, name)}")
        if not -(2**63) <= self.seed < 2**64:  # torch's
            raise ValueError(f"seed should be from -2**63 to 2**64 - 1, got: {self.seed}")
        self.model_config(self.vocab_size)  # its checks

    def model_config(self, vocab_size: int) -> ModelConfig:
        return ModelConfig(vocab_size, self.width, self.encoder_layers, self.decoder_layers, self.dropout)

    def load_splits(self) -> Splits:
        return builtin() if self.train is None else load_splits(self.train, self.dev)


class Reporter(Protocol):
    """Where a run tells how it gets on."""

    def note(self, text: str) -> None: ...

    def step(self, progress: float, loss: float, sentences_per_second: float) -> None: ...


def train(config: TrainingConfig, out: Path, reporter: Reporter) -> dict[str, Any]:
    """Trains into the folder ``out``: the best model by BLEU on dev, and the state to resume from.

    Returns the run's summary, which the model's checkpoint holds too.

    Raises:
        CorpusError: a file of pairs can't be used.
        VocabularyError: ``vocab_size`` is too small for the text.
        CheckpointError: ``out`` holds a run already.
        FloatingPointError: training diverged.
        KeyboardInterrupt: on Ctrl-C or SIGTERM, after the current step or amid an evaluation; the run has been saved.
    """
    started = time.monotonic()
    if (out / TRAINING_FILE).exists():
        raise CheckpointError(f"{out} holds a trained model already: choose another --out, or --resume it")
    if (out / MODEL_FILE).exists():
        raise CheckpointError(f"{out} holds a trained model already: choose another --out")
    splits = config.load_splits()
    config = replace(config, train=_absolute(config.train), dev=_absolute(config.dev))  # it may be resumed elsewhere
    tokenizer = Tokenizer.train((text for p in splits.train for text in (p.english, p.french)), config.vocab_size)
    torch.manual_seed(config.seed)
    return _Run(config, splits, tokenizer, started).go(out, reporter)


def resume(out: Path, reporter: Reporter) -> dict[str, Any]:
    """Goes on with the run in ``out`` from where it was last saved; otherwise as ``train``.

    Raises:
        CheckpointError: there is no run in ``out``, it can't be read, or its text has changed since.
    """
    started = time.monotonic()
    path = out / TRAINING_FILE
    if not path.exists() and (out / MODEL_FILE).exists():
        raise CheckpointError(
            f"{out} holds a model but no {TRAINING_FILE}: its run can't be resumed, choose another --out to train anew"
        )
    tensors, about = load_tensors(path, "training")
    try:
        config, text = TrainingConfig(**about["config"]), about["text"]
        tokenizer = Tokenizer(tensor_bytes(tensors["tokenizer"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} does not hold a run of this version: {error}") from error
    splits = config.load_splits()
    if text != _digest(splits):
        raise CheckpointError(f"{config.train or 'the built-in text'} has changed since {path} was written")
    run = _Run(config, splits, tokenizer, started)
    try:
        run.restore(tensors, about)
    except (KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not hold the state of its own run: {error}") from error
    return run.go(out, reporter)


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).absolute())


class _Run:
    """Everything that changes while training."""

    def __init__(self, config: TrainingConfig, splits: Splits, tokenizer: Tokenizer, started: float) -> None:
        self.config, self.tokenizer, self.text = config, tokenizer, _digest(splits)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.examples = [example for _, example in _fitting("training", splits.train, tokenizer, config.batch_tokens)]
        dev = [pair for pair, _ in _fitting("dev", splits.dev, tokenizer, config.batch_tokens)]
        self.left_out = len(splits.train) - len(self.examples), len(splits.dev) - len(dev)
        self.dev = _spread(dev, DEV_SENTENCES)
        self.model = Translator(config.model_config(len(tokenizer))).to(self.device)
        self.averaged = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), betas=(0.9, 0.98), eps=1e-9, fused=True)
        self.step = self.epoch = self.batch = self.sentences = self.evaluations = 0
        self.best_bleu = -1.0
        self.started = started
        self.plan: list[list[int]] = []  # of this epoch

    def go(self, out: Path, reporter: Reporter) -> dict[str, Any]:
        """Trains to the end of the budget, and a first step if loading took all of it."""
        out.mkdir(parents=True, exist_ok=True)
        sizes = (
            f"{sum(p.numel() for p in self.model.parameters()) / 1e6:.1f}M parameters, {len(self.tokenizer)} subwords"
        )
        reporter.note(f"{len(self.examples)} sentence pairs, {sizes}, on {self.device}")
        reporter.note(f"LSTM on {self._backend()}")
        if any(self.left_out):
            pairs = "{} training pairs and {} dev pairs".format(*self.left_out)
            reporter.note(f"left out for more than {self.config.batch_tokens} subwords (--batch-tokens): {pairs}")
        self.plan = self._plan()
        batches = self._batches()
        with _Interrupts() as interrupts:
            try:
                while self.step == 0 or self.progress() < 1 or self._evaluation_is_due():
                    if self._evaluation_is_due():
                        with interrupts.at_once():
                            loss, bleu = self._evaluate()
                        self._keep(loss, bleu, out, reporter)
                    else:
                        progress = min(self.progress(), 1.0)  # before the next batch counts
                        loss = self._train_step(next(batches), progress)
                        reporter.step(self.progress(), loss, self.sentences / self.seconds())
                    interrupts.check()
            except KeyboardInterrupt:
                self._save(out)
                raise
        return self.summary()

    def seconds(self) -> float:
        """Since the run began, evaluations included, interruptions not."""
        return time.monotonic() - self.started

    def progress(self) -> float:
        """Share of the budget that is spent."""
        if self.config.minutes is not None:
            return self.seconds() / (60 * self.config.minutes)
        if self.config.steps is not None:
            return self.step / self.config.steps
        assert self.config.epochs is not None
        return (self.epoch * len(self.plan) + self.batch) / (self.config.epochs * len(self.plan))

    def summary(self) -> dict[str, Any]:
        """What the run did so far and with what."""
        return {
            "config": asdict(self.config),
            "pairs": len(self.examples),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "steps": self.step,
            "seconds": round(self.seconds(), 1),
            "sentences_per_second": round(self.sentences / self.seconds(), 1),
            "dev_bleu": round(self.best_bleu, 2),
            "lstm": self._backend(),
            "device": str(self.device),
            **environment(),
        }

    def _train_step(self, batch: Batch, progress: float) -> float:
        """One step of the optimiser; the mean loss of a subword."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * min(progress / WARM_UP, (1 - progress) / (1 - WARM_UP))
        loss = smoothed_loss(self.model.train(), batch.to(self.device), SMOOTHING)
        self.optimizer.zero_grad()
        loss.backward()
        norm = clip_grad_norm_(self.model.parameters(), CLIP)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"the gradients are not finite at step {self.step}: try a lower --learning-rate")
        self.optimizer.step()
        self.step += 1
        decay = min(AVERAGING, self.step / (self.step + 10))
        torch._foreach_lerp_(list(self.averaged.parameters()), list(self.model.parameters()), 1 - decay)
        self.sentences += len(batch.source)
        return loss.item()

    def _evaluation_is_due(self) -> bool:
        return self.step > 0 and self._tenths() > self.evaluations

    def _tenths(self) -> int:
        return int(min(self.progress(), 1.0) * EVALUATIONS)

    def _evaluate(self) -> tuple[float, float]:
        """Loss and BLEU of the averaged weights on dev."""
        examples = examples_of(self.tokenizer, self.dev)
        loss = 0.0
        for part in cut(range(len(examples)), [padded(e) for e in examples], DEV_TOKENS, DEV_BATCH):
            with torch.no_grad():
                batch = collate([examples[i] for i in part]).to(self.device)
                loss += smoothed_loss(self.averaged, batch, 0.0).item() * len(part) / len(examples)
        return loss, evaluate(self.averaged, self.tokenizer, self.dev, beam=1).bleu

    def _keep(self, loss: float, bleu: float, out: Path, reporter: Reporter) -> None:
        """Keeps the averaged weights if they are the best so far, and saves the run."""
        self.evaluations = self._tenths()
        best = bleu > self.best_bleu
        if best:
            self.best_bleu = bleu
        reporter.note(
            f"{self.seconds():5.0f} s  step {self.step:6d}  dev loss {loss:.3f}  dev BLEU {bleu:5.2f}" + "  best" * best
        )
        if best:
            self._save_model(out)
        self._save(out)

    def _save_model(self, out: Path) -> None:
        weights = self.averaged.state_dict()
        save_model(out / MODEL_FILE, weights, self.model.config, self.tokenizer, self.summary())

    def _save(self, out: Path) -> None:
        """The run as it stands, and, should no evaluation have kept a model yet, the model as it stands."""
        tensors = {"tokenizer": bytes_tensor(self.tokenizer.model), "random.cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state()
        tensors |= {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"averaged.{name}": tensor for name, tensor in self.averaged.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in state.items()}
        about = {"config": asdict(self.config), "text": self.text, "seconds": self.seconds()}
        about |= {name: getattr(self, name) for name in _PLACE}
        save_tensors(out / TRAINING_FILE, "training", tensors, about)
        if not (out / MODEL_FILE).exists():
            self._save_model(out)

    def restore(self, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        """The state that ``_save`` stored."""
        for name in _PLACE:
            setattr(self, name, about[name])
        self.started -= about["seconds"]
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "averaged": {}, "optimizer": {}, "random": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            if part in parts:
                parts[part][rest] = tensor
        self.model.load_state_dict(parts["model"])
        self.averaged.load_state_dict(parts["averaged"])
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in parts["optimizer"].items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        torch.set_rng_state(parts["random"]["cpu"])
        if self.device.type == "cuda" and "cuda" in parts["random"]:
            torch.cuda.set_rng_state(parts["random"]["cuda"])

    def _plan(self) -> list[list[int]]:
        return plan_epoch(self.examples, self.config.batch_tokens, self.config.seed, self.epoch)

    def _batches(self) -> Iterator[Batch]:
        """From this run's place in the data on, without end."""
        while True:
            while self.batch < len(self.plan):
                self.batch += 1
                yield collate([self.examples[i] for i in self.plan[self.batch - 1]])
            self.epoch, self.batch = self.epoch + 1, 0
            self.plan = self._plan()

    def _backend(self) -> str:
        layer = self.model.decoder[0]
        return explain(layer, torch.empty(1, 1, self.config.width, device=self.device))


_PLACE = ("step", "epoch", "batch", "sentences", "evaluations", "best_bleu")


def smoothed_loss(model: Translator, batch: Batch, smoothing: float) -> Tensor:
    """Mean label-smoothed cross-entropy of a target subword, in nats."""
    memory = model.encode(batch.source, batch.lengths)
    features, _, _ = model.decode(batch.target[:, :-1], memory, memory.state)  # [B, T, W]
    targets = batch.target[:, 1:]
    kept = targets != PAD
    weight, bias = model.embedding.weight, model.output_bias
    return linear_cross_entropy(features[kept], weight, bias, targets[kept], smoothing) / kept.sum()


def examples_of(tokenizer: Tokenizer, pairs: list[Pair]) -> list[Example]:
    sources = tokenizer.encode([pair.english for pair in pairs])
    targets = tokenizer.encode([pair.french for pair in pairs])
    return list(zip(sources, targets, strict=True))


def _fitting(part: str, pairs: list[Pair], tokenizer: Tokenizer, tokens: int) -> list[tuple[Pair, Example]]:
    """The pairs of at most ``tokens`` subwords, as text and as ids."""
    examples = examples_of(tokenizer, pairs)
    fitting = [(pair, example) for pair, example in zip(pairs, examples, strict=True) if padded(example) <= tokens]
    if not fitting:
        shortest = min(map(padded, examples))
        raise CorpusError(f"batch_tokens should be at least {shortest} for any {part} pair to fit, got: {tokens}")
    return fitting


def _spread(pairs: list[Pair], count: int) -> list[Pair]:
    """All pairs of about ``count`` distinct English sentences, evenly from the whole list."""
    grouped = group_references(pairs)
    chosen = grouped[:: math.ceil(len(grouped) / count)]
    return [Pair(english, french) for english, references in chosen for french in references]


def _digest(splits: Splits) -> str:
    """A fingerprint of the text that training sees."""
    lines = (f"{pair.english}\t{pair.french}\n" for pair in (*splits.train, *splits.dev))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


class _Interrupts:
    """Ctrl-C and SIGTERM wait for the end of a step or a save, so that no run is half done; ``at_once`` they don't."""

    def __init__(self) -> None:
        self.seen, self.waits = False, True
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def check(self) -> None:
        if self.seen:
            raise KeyboardInterrupt

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """For what may be left undone."""
        self.waits = False
        try:
            self.check()
            yield
        finally:
            self.waits = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.seen = True
        if not self.waits:
            self.waits = True  # one is enough
            raise KeyboardInterrupt

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
