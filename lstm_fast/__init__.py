"""An LSTM that one switches to by changing one import: torch.nn.LSTM's contract on fused kernels."""

from lstm_fast.dispatch import backends
from lstm_fast.lstm import LSTM, LSTMCell, explain
from lstm_fast.swap import replace, restore

__version__ = "0.1.0"
__all__ = ["LSTM", "LSTMCell", "backends", "explain", "replace", "restore"]
