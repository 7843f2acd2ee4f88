"""Checkpoints in safetensors: a trained model with its subwords and its story, or all that training needs to go on.

Files are written whole or not at all: beside their place first, then moved into it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lstm_fast import files
from lstm_fast.translate.model import ModelConfig, Translator
from lstm_fast.translate.tokenizer import Tokenizer

MODEL_FILE = "model.safetensors"
TRAINING_FILE = "training.safetensors"
_FORMAT = "lstm_fast.translate"
_VERSION = 1
_TOKENIZER = "tokenizer"  # the name of the tensor that holds the sentencepiece model, uint8


class CheckpointError(ValueError):
    """A checkpoint can't be used or would be overwritten; the message is one sentence."""


@dataclass(frozen=True)
class Checkpoint:
    """A model to translate with; ``training`` says how it came about (seconds, steps, versions...)."""

    model: Translator
    tokenizer: Tokenizer
    training: dict[str, Any]


def save_model(
    path: Path, weights: dict[str, Tensor], config: ModelConfig, tokenizer: Tokenizer, training: Any
) -> None:
    """A checkpoint of ``Translator(config)`` with ``weights``; ``training`` is anything json takes."""
    tensors = {**weights, _TOKENIZER: bytes_tensor(tokenizer.model)}
    save_tensors(path, "model", tensors, {"config": asdict(config), "training": training})


def load_model(path: Path) -> Checkpoint:
    """The checkpoint at ``path``, a file or the folder that training wrote; the model is in eval mode.

    Raises:
        CheckpointError: there is none, it is cut short or damaged, or it is of another format, version or model.
    """
    path = path / MODEL_FILE if path.is_dir() else path
    tensors, about = load_tensors(path, "model")
    try:
        tokenizer = Tokenizer(tensor_bytes(tensors.pop(_TOKENIZER)))
        model = Translator(ModelConfig(**about["config"]))
        model.load_state_dict(tensors)
        training = about["training"]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} holds another model than its configuration says: {reason}") from error
    if len(tokenizer) != model.config.vocab_size:
        raise CheckpointError(
            f"{path} holds {len(tokenizer)} subwords for a model of {model.config.vocab_size}, which should be equal"
        )
    return Checkpoint(model.eval(), tokenizer, training)


def save_tensors(path: Path, kind: str, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Tensors and ``about``, anything json takes, as a file of this ``kind``; one there is replaced in one move.

    Raises:
        CheckpointError, OSError: it can't be written.
    """
    metadata = {"format": _FORMAT, "version": str(_VERSION), "kind": kind, "about": json.dumps(about)}
    try:
        with files.whole(path) as new:
            save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, new, metadata)
    except SafetensorError as error:
        raise CheckpointError(f"{path} can't be written: {error}") from error


def load_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What ``save_tensors`` stored, the tensors on the CPU.

    Raises:
        CheckpointError: see ``load_model``.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint at {path}; `lstm-fast train` makes one")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            _check_kind(path, kind, metadata)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
        about: dict[str, Any] = json.loads(metadata["about"])
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not a checkpoint, or it is cut short or damaged: {error}") from error
    return tensors, about


def _check_kind(path: Path, kind: str, metadata: dict[str, str]) -> None:
    if metadata.get("format") != _FORMAT:
        raise CheckpointError(f"{path} is a safetensors file, but not a checkpoint of this translator")
    if metadata.get("version") != str(_VERSION):
        raise CheckpointError(
            f"{path} is a checkpoint of version {metadata.get('version')}; this lstm_fast reads version {_VERSION}"
        )
    if metadata.get("kind") != kind:
        raise CheckpointError(f"{path} is a checkpoint of kind {metadata.get('kind')!r}, where {kind!r} is expected")


def bytes_tensor(data: bytes) -> Tensor:
    """uint8 [len(data)]."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def tensor_bytes(tensor: Tensor) -> bytes:
    return tensor.numpy().tobytes()
