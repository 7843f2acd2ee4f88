"""Training as users know it, with nn.LSTM and with lstm_fast: the translator, and a plain language model.

Two copies of one model, equal but for the class of their LSTMs, train in turn step by step on the same batches with the
same dropout masks. A step is forward, loss, backward, clipping and AdamW. A rate is tokens over the time of all counted
steps; the ratio is the median of theirs / ours pair by pair.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count, cycle, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

import lstm_fast
from lstm_fast.bench.timing import compared
from lstm_fast.translate.batches import Batch, collate, plan_epoch
from lstm_fast.translate.corpus import Splits, builtin
from lstm_fast.translate.model import Translator
from lstm_fast.translate.tokenizer import PAD, Tokenizer
from lstm_fast.translate.training import CLIP, SMOOTHING, TrainingConfig, examples_of, smoothed_loss

WARM_UP = 3  # steps of each side, trained but not counted
LEARNING_RATE = 1e-3
# Relative difference of the losses, per step trained. Training magnifies rounding: the translator's curves parted by at
# most 6e-6 a step in 43 steps (five seeds; a CPU with bf16 products in the loss) and 5e-5 in 250, lstm_fast's own after
# one rounding of its weights by 6e-5; the language model's by less. Noise of 0.1 in y gave 4e-4 and more in 15 steps.
TOLERANCE = 1e-4
_SEED = 0
_CONFIG = TrainingConfig(epochs=1)


class Task(NamedTuple):
    """What is trained: a model, its batches without end, its mean loss, and how many tokens that is the mean of."""

    model: nn.Module
    batches: Iterator[Any]  # with a method ``to(device)``
    loss: Callable[[Any, Any], Tensor]  # of the model and a batch
    tokens: Callable[[Any], int]


def translator(splits: Splits, config: TrainingConfig = _CONFIG) -> Task:
    """The model, batches and loss of ``lstm-fast train``; a token is a French subword, padding aside."""
    tokenizer = Tokenizer.train((text for p in splits.train for text in (p.english, p.french)), config.vocab_size)
    examples = examples_of(tokenizer, splits.train)

    def batches() -> Iterator[Batch]:
        for epoch in count():
            for plan in plan_epoch(examples, config.batch_tokens, config.seed, epoch):
                yield collate([examples[i] for i in plan])

    def tokens(batch: Batch) -> int:
        return int((batch.target[:, 1:] != PAD).sum())

    model = Translator(config.model_config(len(tokenizer)))
    return Task(model, batches(), partial(smoothed_loss, smoothing=SMOOTHING), tokens)


def language_model(splits: Splits, width: int = 256, sequences: int = 32, steps: int = 64) -> Task:
    """Characters of the English text by truncated backpropagation: B ``sequences``, segments of T ``steps``."""
    text = "\n".join(pair.english for pair in splits.train)
    ids = {character: index for index, character in enumerate(sorted(set(text)))}
    rows = torch.tensor([ids[character] for character in text[: len(text) // sequences * sequences]])
    columns = rows.view(sequences, -1).t()  # [N, B], each sequence a piece of text without a gap
    segments = [columns[i : i + steps + 1] for i in range(0, len(columns) - steps, steps)]  # each [T + 1, B]
    return Task(LanguageModel(len(ids), width), cycle(segments), LanguageModel.loss, lambda s: s[1:].numel())


class LanguageModel(nn.Module):
    """V characters, embedded in ``width`` W, through two LSTM layers; it keeps their state between segments."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.lstm = nn.LSTM(width, width, num_layers=2)
        self.output = nn.Linear(width, vocab_size)
        self.state: tuple[Tensor, Tensor] | None = None

    def loss(self, segment: Tensor) -> Tensor:
        """Mean cross-entropy of a character in ``segment`` [T + 1, B] given those before it, in nats."""
        y, (h, c) = self.lstm(self.embedding(segment[:-1]), self.state)  # y [T, B, W]
        self.state = h.detach(), c.detach()
        return nn.functional.cross_entropy(self.output(y).flatten(0, 1), segment[1:].flatten())


TASKS: dict[str, Callable[[Splits], Task]] = {"translator": translator, "language model": language_model}


def run(task: str, steps: int = 40) -> dict[str, Any]:
    """Trains both sides for ``steps`` counted steps; the result is ready for JSON. torch's random state is kept.

    Raises:
        ValueError: there is no such task, or fewer than two steps.
    """
    if task not in TASKS:
        raise ValueError(f"task should be {' or '.join(map(repr, TASKS))}, got: {task!r}")
    if steps < 2:
        raise ValueError(f"steps should be at least 2, got: {steps}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens = 0
    with torch.random.fork_rng():
        torch.manual_seed(_SEED)
        made = TASKS[task](builtin())
        theirs = _Side(made.loss, lstm_fast.restore(copy.deepcopy(made.model)), device)
        ours = _Side(made.loss, lstm_fast.replace(made.model), device)
        for seed, batch in enumerate(islice(made.batches, WARM_UP + steps)):
            tokens += made.tokens(batch) if seed >= WARM_UP else 0
            batch = batch.to(device)
            ours.step(batch, seed)
            theirs.step(batch, seed)
    return {"task": task, "steps": steps, **_compare(ours, theirs, tokens)}


def table(results: list[dict[str, Any]]) -> str:
    """The results of ``run`` as lines of text."""
    lines = [
        f"{'':14}  {'tokens per second':^22}  {'times as fast':>18}",
        f"{'':14}  {'lstm_fast':>10}  {'nn.LSTM':>10}  {'median':>7} {'p20..p80':>10}  loss",
    ]
    for r in results:
        rates, curve = r["tokens_per_s"], r["loss"]["ours"]
        spread = f"{r['ratio_p20']:.2f}..{r['ratio_p80']:.2f}"
        verdict = "the same curve" if r["same_curve"] else f"NOT the same curve: off by {r['loss_difference']:.1e}"
        lines.append(
            f"{r['task']:14}  {rates['ours']:10,.0f}  {rates['torch']:10,.0f}  {r['ratio']:6.2f}× {spread:>10}  "
            f"{curve[0]:.2f} to {curve[-1]:.2f} in {r['steps']} steps, {verdict}"
        )
    return "\n".join(lines)


class _Side:
    """One of the two models, its optimiser, and what its steps gave."""

    def __init__(self, loss: Callable[[Any, Any], Tensor], model: nn.Module, device: torch.device) -> None:
        self.loss, self.model = loss, model.to(device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), LEARNING_RATE, fused=True)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, batch: Any, seed: int) -> None:
        torch.manual_seed(seed)  # both sides draw the same dropout masks
        start = time.perf_counter()
        loss = self.loss(self.model, batch)
        self.optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.losses.append(loss.item())  # waits for a GPU to finish the step
        self.seconds.append(time.perf_counter() - start)


def _compare(ours: _Side, theirs: _Side, tokens: int) -> dict[str, Any]:
    """Rates, ratios and loss curves of the counted steps."""
    a, b = ours.seconds[WARM_UP:], theirs.seconds[WARM_UP:]
    ratios = compared(a, b)
    curves = torch.tensor([ours.losses, theirs.losses], dtype=torch.float64)[:, WARM_UP:]
    difference = (curves[0] / curves[1] - 1).abs()  # NaN, which is within no tolerance, where a loss is
    trained = torch.arange(WARM_UP + 1, len(ours.losses) + 1)
    return {
        "tokens_per_s": {"ours": tokens / sum(a), "torch": tokens / sum(b)},
        **{name: ratios[name] for name in ("ratio", "ratio_p20", "ratio_p80")},
        "loss": {"ours": curves[0].tolist(), "torch": curves[1].tolist()},
        "loss_difference": difference.max().item(),
        "same_curve": bool((difference <= TOLERANCE * trained).all()),
    }
