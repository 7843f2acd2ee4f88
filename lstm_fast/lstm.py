"""``LSTM`` and ``LSTMCell``: torch.nn's signatures, names, input forms and errors, no maths of their own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lstm_fast.autograd import done_on_cpu, layer
from lstm_fast.context import (
    autocast_dtype,
    autocast_enabled,
    cast,
    is_followed,
    is_profiled,
    is_traced,
    transforms_active,
)
from lstm_fast.dispatch import Choice, check_backend, choose, surely_cpu
from lstm_fast.kernels import Weights
from lstm_fast.kernels.cpu import infer, train

State = tuple[Tensor, Tensor]
_NO_WEIGHTS: Any = (None,) * 5


class _Fused(nn.Module):
    """What LSTM and LSTMCell share: the choice of a backend, and standing aside for tracers."""

    _torch_class: Any  # of torch.nn, with the same parameters
    if TYPE_CHECKING:  # torch.jit, which compiles subclasses, can't read an attribute's annotation that is text
        hidden_size: int
        weight_ih_l0: Tensor
    proj_size = 0
    backend = "auto"  # a class attribute, so that modules pickled by torch and swapped ones have it too

    def _choose(self, x: Tensor | PackedSequence, dtype: torch.dtype) -> Choice:
        data = x.data if isinstance(x, PackedSequence) else x
        place = (self.backend, data.device, dtype, self.hidden_size, self.proj_size)
        return choose(*place, is_traced(), transforms_active(), self._kind(x), lambda: self._shape(x))

    def _quick(self, input: Any, hx: Any) -> Any:
        """The results, of a packed input its data and states, if the call is a plain one on a CPU; None if it isn't, or
        if its arguments need more than a quick look. A single step of a small layer takes half the time this way, and a
        quarter less in training."""
        x, batch_sizes = (input.data, input.batch_sizes) if isinstance(input, PackedSequence) else (input, None)
        if type(x) is not Tensor or not x.is_cpu or autocast_enabled() or is_followed() or is_profiled():
            return None
        if not surely_cpu(self.backend, x.dtype, self.hidden_size, self._kind(input), lambda: self._shape(input)):
            return None
        if torch.is_grad_enabled() and self._may_have_gradients(x, hx):
            return self._train(x, hx, batch_sizes)
        return infer(self, x, hx, batch_sizes)

    def _may_have_gradients(self, x: Tensor, hx: Any) -> bool:
        for parameter in self._parameters.values():  # by far the most often the first says so
            if parameter is not None and parameter.requires_grad:
                return True
        return x.requires_grad or (isinstance(hx, tuple) and any(getattr(t, "requires_grad", None) is True for t in hx))

    def _train(self, x: Tensor, hx: Any, batch_sizes: Tensor | None) -> Any:
        """The same where gradients may be asked for."""
        raise NotImplementedError

    def _kind(self, x: Tensor | PackedSequence) -> str:
        """``measured.Call``'s."""
        raise NotImplementedError

    def _shape(self, x: Tensor | PackedSequence) -> tuple[int, int]:
        """T and B of a call."""
        raise NotImplementedError

    def _under_autocast(self, dtype: torch.dtype, x: Tensor, hx: Any, stepwise: bool) -> torch.dtype:
        """The weights' ``dtype``, or autocast's; on a CPU ``stepwise`` calls keep to the states', as in torch."""
        if not autocast_enabled():
            return dtype
        low = autocast_dtype(x.device.type)
        if low is None or not dtype.is_floating_point or dtype == torch.float64:
            return dtype
        if stepwise and x.device.type == "cpu":
            state: Tensor = x if hx is None else hx[1]
            return state.dtype
        return low

    def _parameter(self, name: str) -> Tensor:
        """By getattr, which takes as long as a small product, only where it is parametrised, pruned or replaced."""
        found = self._parameters.get(name)
        return getattr(self, name) if found is None else found

    def _dtype_of(self, name: str) -> torch.dtype:
        """A parameter's. One that is parametrised isn't computed for it: that may draw random numbers."""
        kept: Any = self._modules.get("parametrizations")
        if kept is not None and name in kept and not kept[name].unsafe:  # what it makes has the original's dtype
            original: Tensor = kept[name].original if kept[name].is_tensor else kept[name].original0
            return original.dtype
        return self._parameter(name).dtype

    def _weights(self, names: list[str], dtype: torch.dtype) -> Weights:
        """One direction's parameters as they are at this call: parametrised, pruned, replaced or not."""
        found = []
        for name in names:
            weight = self._parameter(name)
            found.append(weight if weight is None or weight.dtype == dtype else cast(weight, dtype))
        w_ih, w_hh, *rest = found
        b_ih, b_hh = rest[:2] if len(rest) > 1 else (None, None)
        w_hr = rest[-1] if self.proj_size > 0 else None
        return w_ih, w_hh, b_ih, b_hh, w_hr

    def _as_fx_leaf(self, x: Any, hx: Any) -> Any:
        """torch.fx takes modules of torch.nn as leaves by their module path; this makes ours one too. None where no
        argument is a proxy."""
        for value in (x, hx, *(hx if isinstance(hx, (tuple, list)) else ())):
            if isinstance(value, torch.fx.Proxy):
                tracer: Any = value.tracer
                return tracer.create_proxy("call_module", tracer.path_of_module(self), (x, hx), {})
        return None

    def __prepare_scriptable__(self) -> nn.Module:
        """torch.jit.script compiles, and leaves in the parent, the torch module that shares these parameters, unless a
        subclass has a forward of its own."""
        if type(self).forward not in (LSTM.forward, LSTMCell.forward):
            return self
        module = copy.copy(self)
        module.__class__ = self._torch_class
        return module


class LSTM(_Fused, nn.RNNBase):
    """Drop-in replacement for :class:`torch.nn.LSTM` on fused kernels.

    Arguments, parameters, initialisation, state_dict, input forms, outputs and errors are those of
    :class:`torch.nn.LSTM`; equations F1-F6 and B1-B8 stand in ``lstm_fast/reference.py``. It subclasses nn.RNNBase and
    not nn.LSTM, on whose instances torch.compile breaks the graph.

    Args:
        input_size: features I of an input step.
        hidden_size: hidden units H.
        num_layers: stacked layers L.
        bias: whether b_ih and b_hh exist.
        batch_first: input and output are (B, T, F) in place of (T, B, F); states keep their layout.
        dropout: probability, on the output of each layer but the last, in training.
        bidirectional: a second direction, from the last step to the first; D = 2, else 1.
        proj_size: P > 0 projects h to P features (R = P, else R = H).
        device, dtype: of the parameters.
        backend: "auto", or one that must serve: "persistent", "cuda", "triton", "cpu", "reference". "auto" takes what
            ``LSTM_FAST_BACKEND`` names, if set.

    Inputs: ``input`` (T, B, I), (B, T, I) with ``batch_first``, (T, I) or a PackedSequence; ``hx`` None for zeros, or
    h_0 (D*L, B, R) and c_0 (D*L, B, H), without B for an unbatched input.

    Outputs: ``output`` (T, B, D*R) in the input's form, and (h_n, c_n) shaped as h_0 and c_0. On a CPU, gradients below
    the smallest normal number (1.2e-38 in fp32) are 0.

    Raises:
        ValueError, RuntimeError, TypeError: as torch.nn.LSTM does, and where that reads out of bounds or truncates in
            silence (a weight of the wrong shape, too many rows of hx for a packed input). RuntimeError also if
            ``backend`` cannot serve the call.
    """

    _torch_class: Any = nn.LSTM

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: Any = None,
        *,
        backend: str = "auto",
    ) -> None:
        sizes = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size)
        super().__init__("LSTM", *sizes, device=device, dtype=dtype)
        if backend != "auto":
            self.backend = check_backend(backend)

    # nn.LSTM's own methods, which need no more of self than what RNNBase has
    get_expected_cell_size: Any = nn.LSTM.get_expected_cell_size
    check_forward_args: Any = nn.LSTM.check_forward_args
    permute_hidden: Any = nn.LSTM.permute_hidden

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        """RNNBase's check, of the weight that is there now."""
        dtype = self._dtype_of("weight_ih_l0")
        if input.dtype != dtype and not autocast_enabled():
            raise ValueError(
                f"RNN input dtype ({input.dtype}) does not match weight dtype ({dtype}). "
                f"Convert input: input.to({dtype}), or convert model: model.to({input.dtype})"
            )
        expected = 2 if batch_sizes is not None else 3
        if input.dim() != expected:
            raise RuntimeError(f"input must have {expected} dimensions, got {input.dim()}")
        if self.input_size != input.size(-1):
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {input.size(-1)}"
            )

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.backend == "auto" else f", backend={self.backend!r}")

    def forward(self, input: Any, hx: Any = None) -> Any:
        packed = isinstance(input, PackedSequence)
        if not packed or hx is None or input.sorted_indices is None:  # states are checked before they are sorted
            found = self._quick(input, hx)
            if found is not None:
                return self._packed(input, *found) if packed else found
        leaf = self._as_fx_leaf(input, hx)
        if leaf is not None:
            return leaf
        if isinstance(hx, Tensor):
            raise TypeError("hx should be a tuple (h_0, c_0), got: Tensor")
        if not packed and input.dim() not in (2, 3):
            raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
        dtype = self._compute_dtype(input.data if packed else input, hx, packed)
        choice = self._choose(input, dtype)
        if choice.backend == "torch":
            return self._torch_class.forward(self, input, hx)
        forward = self._forward_packed if packed else self._forward_dense
        return forward(input, hx, dtype, choice)

    def _train(self, x: Tensor, hx: Any, batch_sizes: Tensor | None) -> Any:
        if x.dim() != (3 if batch_sizes is None else 2) or (hx is not None and self.num_layers > 1):
            return None
        turned = self.batch_first and batch_sizes is None
        y = x.transpose(0, 1).contiguous() if turned else x
        states = []
        for k in range(self.num_layers):
            found = train(self, k, y, hx, batch_sizes)
            if found is None:
                return None
            inputs, outputs = found
            y, *state = done_on_cpu(inputs, outputs, batch_sizes)
            states.append(state)
        h_n, c_n = states[0] if len(states) == 1 else (torch.cat(all_of) for all_of in zip(*states, strict=True))
        return y.transpose(0, 1) if turned else y, (h_n, c_n)

    def _drops(self) -> bool:
        return self.dropout > 0 and self.training

    def _kind(self, x: Tensor | PackedSequence) -> str:
        return "packed" if isinstance(x, PackedSequence) else "projected" if self.proj_size > 0 else "layer"

    def _shape(self, x: Tensor | PackedSequence) -> tuple[int, int]:
        if isinstance(x, PackedSequence):
            return len(x.batch_sizes), int(x.batch_sizes[0])
        if x.dim() == 2:
            return x.size(0), 1
        return (x.size(1), x.size(0)) if self.batch_first else (x.size(0), x.size(1))

    def _forward_dense(self, input: Tensor, hx: Any, dtype: torch.dtype, choice: Choice) -> tuple[Tensor, State]:
        batched = input.dim() == 3
        batch_first = batched and self.batch_first
        if hx is not None:
            hx = self._batched_state(hx, batched)
        x = input if batched else input.unsqueeze(0 if self.batch_first else 1)
        if hx is None:
            self.check_input(x, None)
        else:
            self.check_forward_args(x, hx, None)
        x = x.transpose(0, 1) if self.batch_first else x  # [T, B, I]
        if x.size(0) == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        y, h_n, c_n = self._layers(x.contiguous(), hx, None, dtype, choice.backend)
        if not batched:
            return y.squeeze(1), (h_n.squeeze(1), c_n.squeeze(1))
        return y.transpose(0, 1) if batch_first else y, (h_n, c_n)

    def _forward_packed(
        self, input: PackedSequence, hx: Any, dtype: torch.dtype, choice: Choice
    ) -> tuple[PackedSequence, State]:
        x, batch_sizes, sorted_indices, _ = input
        if hx is None:
            self.check_input(x, batch_sizes)
        else:
            hx = self._batched_state(hx, True)
            self.check_forward_args(x, hx, batch_sizes)
            hx = self.permute_hidden(hx, sorted_indices)
        y, h_n, c_n = self._layers(x, hx, batch_sizes, dtype, choice.backend)
        return self._packed(input, y, (h_n, c_n))

    def _packed(self, input: PackedSequence, y: Tensor, states: State) -> tuple[PackedSequence, State]:
        """The results in the caller's order."""
        _, batch_sizes, sorted_indices, unsorted_indices = input
        output = PackedSequence(y, batch_sizes, sorted_indices, unsorted_indices)
        return output, self.permute_hidden(states, unsorted_indices)

    def _layers(
        self, x: Tensor, hx: State | None, batch_sizes: Tensor | None, dtype: torch.dtype, backend: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Every layer over x [T, B, I], or packed [N, I]: y in x's form, h_n [D*L, B, R], c_n [D*L, B, H]."""
        directions = 2 if self.bidirectional else 1
        h_0, c_0 = (self.proj_size or self.hidden_size, self.hidden_size) if hx is None else hx
        cell_dtype = dtype
        if autocast_enabled():  # without, ``layer`` refuses mixed dtypes
            if self.proj_size > 0 and x.device.type == "cpu":
                cell_dtype = (x if hx is None else hx[1]).dtype  # as torch has it
            x = x.to(dtype)
            h_0, c_0 = (s if isinstance(s, int) else s.to(dtype) for s in (h_0, c_0))
        states = []
        for k in range(self.num_layers):
            rows = slice(k * directions, (k + 1) * directions)
            weights = [self._weights(names, dtype) for names in self._all_weights[rows]]
            weights += [_NO_WEIGHTS] * (directions - len(weights))  # where a module was changed by hand
            h, c = (s if isinstance(s, int) or self.num_layers == 1 else s[rows] for s in (h_0, c_0))
            x, h_n, c_n = layer(x, h, c, weights, batch_sizes, backend)
            states.append((h_n, c_n if cell_dtype == dtype else c_n.to(cell_dtype)))
            if self._drops() and k < self.num_layers - 1:
                x = nn.functional.dropout(x, self.dropout, True)
        if len(states) == 1:
            return x, *states[0]
        return x, torch.cat([h for h, _ in states]), torch.cat([c for _, c in states])

    def _compute_dtype(self, x: Tensor, hx: Any, packed: bool) -> torch.dtype:
        return self._under_autocast(self._dtype_of("weight_ih_l0"), x, hx, stepwise=packed and self.proj_size == 0)

    def _batched_state(self, hx: Sequence[Tensor], batched: bool) -> State:
        """h_0 and c_0 with their batch dimension; the errors are torch.nn.LSTM's."""
        dims = (hx[0].dim(), hx[1].dim())
        if len(hx) != 2:
            raise RuntimeError(f"lstm expects two hidden states, got {len(hx)}")
        if batched and dims != (3, 3):
            raise RuntimeError(
                f"For batched 3-D input, hx and cx should also be 3-D but got ({dims[0]}-D, {dims[1]}-D) tensors"
            )
        if not batched and dims != (2, 2):
            raise RuntimeError(
                f"For unbatched 2-D input, hx and cx should also be 2-D but got ({dims[0]}-D, {dims[1]}-D) tensors"
            )
        return (hx[0], hx[1]) if batched else (hx[0].unsqueeze(1), hx[1].unsqueeze(1))


_CELL = [["weight_ih", "weight_hh", "bias_ih", "bias_hh"]]


class LSTMCell(_Fused, nn.modules.rnn.RNNCellBase):
    """Drop-in replacement for :class:`torch.nn.LSTMCell`: one step of one layer.

    Args:
        input_size, hidden_size: features I and hidden units H.
        bias: whether b_ih and b_hh exist.
        device, dtype: of the parameters.
        backend: as for :class:`LSTM`.

    Inputs: ``input`` (B, I) or (I,); ``hx`` None for zeros, or h (B, H) or (H,) and c alike.

    Outputs: (h', c'), shaped as the states.

    Raises:
        ValueError, RuntimeError: as torch.nn.LSTMCell does; RuntimeError also if ``backend`` cannot serve the call.
    """

    _torch_class: Any = nn.LSTMCell

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)
        if backend != "auto":
            self.backend = check_backend(backend)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.backend == "auto" else f", backend={self.backend!r}")

    def forward(self, input: Any, hx: Any = None) -> Any:
        found = self._quick(input, hx)
        if found is not None:
            return found
        leaf = self._as_fx_leaf(input, hx)
        if leaf is not None:
            return leaf
        if is_traced():  # the graph holds torch's operators; to look at sizes here would make torch warn
            return self._torch_class.forward(self, input, hx)
        h, c = self._checked_state(input, hx)
        dtype = self._compute_dtype(input, hx)
        choice = self._choose(input, dtype)
        if choice.backend == "torch":
            return self._torch_class.forward(self, input, hx)
        batched = input.dim() == 2
        x = input if batched else input.unsqueeze(0)
        weights = self._weights(_CELL[0], dtype)
        if autocast_enabled():  # without, ``layer`` refuses mixed dtypes
            x, h, c = x.to(dtype), h.to(dtype), c.to(dtype)
        if transforms_active():
            y, _, c = layer(x, h, c, [weights], None, choice.backend)
        else:
            y, _, c_n = layer(x, h.unsqueeze(0), c.unsqueeze(0), [weights], None, choice.backend)
            c = c_n[0]
        return (y, c) if batched else (y[0], c[0])

    def _train(self, x: Tensor, hx: Any, batch_sizes: Tensor | None) -> Any:
        found = train(self, 0, x, hx, batch_sizes)
        if found is None:
            return None
        h, _, c = done_on_cpu(*found)
        return h, c

    def _kind(self, x: Tensor | PackedSequence) -> str:
        return "cell"

    def _shape(self, x: Tensor | PackedSequence) -> tuple[int, int]:
        return 1, x.data.size(0) if x.data.dim() == 2 else 1

    def _compute_dtype(self, x: Tensor, hx: Any) -> torch.dtype:
        dtype = self._dtype_of("weight_ih")
        if x.dtype != dtype and autocast_dtype(x.device.type) is None:
            raise RuntimeError(f"input and weight_ih must have the same dtype, but got {x.dtype} and {dtype}")
        return self._under_autocast(dtype, x, hx, stepwise=True)

    def _checked_state(self, input: Tensor, hx: Any) -> State:
        """h and c as [B, H]."""
        if input.dim() not in (1, 2):
            raise ValueError(f"LSTMCell: Expected input to be 1D or 2D, got {input.dim()}D instead")
        for index, value in enumerate(() if hx is None else hx):
            if value.dim() not in (1, 2):
                raise ValueError(f"LSTMCell: Expected hx[{index}] to be 1D or 2D, got {value.dim()}D instead")
        if hx is not None and len(hx) != 2:
            raise RuntimeError(f"lstm_cell expects two hidden states, got {len(hx)}")
        x = input if input.dim() == 2 else input.unsqueeze(0)
        if x.size(1) != self.input_size:
            raise RuntimeError(f"input has inconsistent input_size: got {x.size(1)} expected {self.input_size}")
        if hx is None:
            zeros = x.new_zeros(x.size(0), self.hidden_size)
            return zeros, zeros
        states = []
        for index, value in enumerate(hx):
            state = value if input.dim() == 2 else value.unsqueeze(0)
            if state.dim() != 2 or state.size(-1) != self.hidden_size:
                raise RuntimeError(
                    f"hidden{index} has inconsistent hidden_size: got {state.size(-1)}, expected {self.hidden_size}"
                    if state.dim() == 2
                    else f"hx[{index}] should be {input.dim()}-D as input is, got {value.dim()}-D"
                )
            if state.size(0) != x.size(0):
                raise RuntimeError(
                    f"Input batch size {x.size(0)} doesn't match hidden{index} batch size {state.size(0)}"
                )
            states.append(state)
        return states[0], states[1]


def explain(module: nn.Module, input: Tensor | PackedSequence, hx: State | None = None) -> str:
    """Which backend would serve ``module(input, hx)``, and why, in one line.

    Args:
        module: an :class:`LSTM` or :class:`LSTMCell`.
        input: what the module would be called with.
        hx: likewise.
    Raises:
        TypeError: ``module`` is of another class.
        RuntimeError: the module names a backend that cannot serve the call.
    """
    data = input.data if isinstance(input, PackedSequence) else input
    if isinstance(module, LSTM):
        dtype = module._compute_dtype(data, hx, isinstance(input, PackedSequence))
    elif isinstance(module, LSTMCell):
        dtype = module._compute_dtype(data, hx)
    else:
        raise TypeError(f"module should be an lstm_fast.LSTM or LSTMCell, got: {type(module).__name__}")
    choice = module._choose(input, dtype)
    return f"{choice.backend}: {choice.reason}"
