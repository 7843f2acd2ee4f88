"""``replace`` and ``restore``: change the class of the LSTMs inside a model, and nothing else about them."""

from __future__ import annotations

from types import MethodType
from typing import TypeVar

from torch import nn
from torch.nn.utils import parametrize

from lstm_fast.lstm import LSTM, LSTMCell

Model = TypeVar("Model", bound=nn.Module)

_TO_FAST: dict[type, type] = {nn.LSTM: LSTM, nn.LSTMCell: LSTMCell}
_TO_TORCH: dict[type, type] = {fast: plain for plain, fast in _TO_FAST.items()}


def replace(model: Model) -> Model:
    """Turn every nn.LSTM and nn.LSTMCell in ``model`` into lstm_fast's, in place; return ``model``.

    The module objects stay the same, and with them parameters, hooks, parametrisations, names and whatever an
    optimiser holds. Subclasses with code of their own are left alone.
    """
    return _swap(model, _TO_FAST)


def restore(model: Model) -> Model:
    """Turn every lstm_fast.LSTM and LSTMCell in ``model`` back into torch.nn's, in place; return ``model``."""
    return _swap(model, _TO_TORCH)


def _swap(model: Model, classes: dict[type, type]) -> Model:
    for module in model.modules():
        cls = type(module)
        forward = cls.forward
        if cls in classes:
            module.__class__ = classes[cls]
        elif parametrize.is_parametrized(module) and cls.__bases__[0] in classes:
            # parametrize makes a subclass per instance that only holds the parametrised properties
            base = classes[cls.__bases__[0]]
            body = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__", "__doc__")}
            module.__class__ = type(f"Parametrized{base.__name__}", (base,), body)
        else:
            continue
        module.__dict__.pop("backend", None)
        for name, value in module.__dict__.items():  # forward itself, where something else wraps it
            if isinstance(value, MethodType) and value.__func__ is forward:
                module.__dict__[name] = MethodType(type(module).forward, value.__self__)
    return model
