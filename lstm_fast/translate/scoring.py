"""BLEU (Papineni et al. 2002) and chrF (Popović 2015) as sacrebleu defines them, with its signatures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from lstm_fast.translate.corpus import Pair, group_references
from lstm_fast.translate.model import Translator
from lstm_fast.translate.search import BEAM, translate
from lstm_fast.translate.tokenizer import Tokenizer


@dataclass(frozen=True)
class Scores:
    """Corpus scores from 0 to 100; a score means something only with its signature."""

    bleu: float
    chrf: float
    bleu_signature: str
    chrf_signature: str
    sentences: int


def score(translations: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """Cased, detokenised corpus scores of ``translations[i]`` against all of ``references[i]``, at least one each."""
    if len(translations) != len(references):
        raise ValueError(
            f"there should be references for each translation, got: {len(references)} for {len(translations)}"
        )
    streams = [list(stream) for stream in zip_longest(*references)]  # None where a sentence has fewer references
    bleu, chrf = BLEU(), CHRF()
    return Scores(
        bleu=bleu.corpus_score(translations, streams).score,
        chrf=chrf.corpus_score(translations, streams).score,
        bleu_signature=str(bleu.get_signature()),
        chrf_signature=str(chrf.get_signature()),
        sentences=len(translations),
    )


def evaluate(model: Translator, tokenizer: Tokenizer, pairs: Sequence[Pair], beam: int = BEAM) -> Scores:
    """Scores of the model's translations; each distinct English sentence once, against all its French ones."""
    grouped = group_references(pairs)
    translations = translate(model, tokenizer, [english for english, _ in grouped], beam)
    return score([translation.text for translation in translations], [french for _, french in grouped])
