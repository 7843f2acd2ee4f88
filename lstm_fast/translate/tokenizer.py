"""Joint English and French subwords (Kudo & Richardson 2018; BPE: Sennrich et al. 2016) on sentencepiece."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

import sentencepiece

PAD, UNK, BOS, EOS = 0, 1, 2, 3


class VocabularyError(ValueError):
    """Subwords can't be made as asked; the message is one sentence."""


class Tokenizer:
    """Text to subword ids and back. Every text has an encoding: characters never seen fall back to bytes.

    Args:
        model: a serialized sentencepiece model, as ``train(...).model`` holds it.
    Raises:
        ValueError: ``model`` is not one, or its special ids are not PAD, UNK, BOS, EOS = 0, 1, 2, 3.
    """

    def __init__(self, model: bytes) -> None:
        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise ValueError("model should be a serialized sentencepiece model") from error
        found = tuple(getattr(self._processor, name)() for name in ("pad_id", "unk_id", "bos_id", "eos_id"))
        if found != (PAD, UNK, BOS, EOS):
            raise ValueError(f"the model's pad, unk, bos and eos ids should be 0, 1, 2 and 3, got: {found}")

    @classmethod
    def train(cls, sentences: Iterable[str], vocab_size: int) -> Tokenizer:
        """Subwords of both languages together; at most ``vocab_size``, fewer where the text has no more to offer.

        The same sentences in the same order give the same bytes.

        Raises:
            VocabularyError: ``vocab_size`` is below the number of bytes and characters that the text needs.
        """
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(sentences),
                model_writer=model,
                model_type="unigram",
                vocab_size=vocab_size,
                hard_vocab_limit=False,
                byte_fallback=True,
                character_coverage=0.9999,
                pad_id=PAD,
                unk_id=UNK,
                bos_id=BOS,
                eos_id=EOS,
                num_threads=1,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise VocabularyError(f"vocab_size should be larger for this text, got: {vocab_size}") from error
        return cls(model.getvalue())

    def __len__(self) -> int:
        return int(self._processor.get_piece_size())

    def encode(self, sentences: Sequence[str]) -> list[list[int]]:
        """Subword ids of each sentence, without BOS and EOS."""
        ids: list[list[int]] = self._processor.encode(list(sentences))
        return ids

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """The text of each id sequence; special ids leave no trace."""
        text: list[str] = self._processor.decode([list(sentence) for sentence in ids])
        return text

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The subwords themselves; ``▁`` marks the start of a word."""
        return [self._processor.id_to_piece(i) for i in ids]
