"""What is in force around a call: tracers, transforms, profilers and autocast."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

# To look these up takes longer than they do.
autocast_enabled = torch._C._is_any_autocast_enabled
is_profiled = torch._C._autograd._profiler_enabled
_transforms = torch._C._functorch.peek_interpreter_stack
_dispatch_modes = torch._C._len_torch_dispatch_stack
_is_tracing = torch._C._is_tracing
_saving_is_hooked: Any = torch._C._autograd._top_saved_tensors_default_hooks


def transforms_active() -> bool:
    """Whether a torch.func transform or forward-mode AD is at work: no kernel can look inside their tensors."""
    return _transforms() is not None or forward_ad._current_level >= 0


# Dynamo, which traces to know what is so, takes "no transform" for one: an object that isn't None.
transforms_active._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_traced() -> bool:
    """Whether operators are recorded as TorchScript or ONNX have them; an export that doesn't trace compiles."""
    return torch.jit.is_tracing() or (torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export())


def is_followed() -> bool:
    """Whether someone needs more of a call than its results and their gradients."""
    return torch.compiler.is_compiling() or _dispatch_modes() > 0 or _is_tracing() or transforms_active()


def autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast computes in on this type of device, or None where it is off."""
    if not torch.amp.is_autocast_available(device):
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight`` in another dtype. In autocast's it is the copy that torch keeps for the context, one for a whole loop:
    a product without columns makes torch find it, or make it, and save it where it can be read. A weight that changed
    since, and a CUDA graph, which outlives the context, have copies of their own."""
    kept = type(weight) is nn.Parameter and weight.requires_grad and weight.dim() == 2
    kept = kept and not (weight.is_cuda and torch.cuda.is_current_stream_capturing())
    if kept and dtype == autocast_dtype(weight.device.type) and not (is_followed() or _saving_is_hooked(False)):
        with torch.inference_mode(False), torch.enable_grad():
            none = torch.empty(weight.size(1), 0, dtype=dtype, device=weight.device, requires_grad=True)
            node: Any = torch.mm(weight, none).grad_fn
            found: Tensor = node._saved_self
        version = 0 if weight.is_inference() else weight._version
        if found.__dict__.setdefault("_lstm_fast_of_version", version) != version:  # which lives as long as the copy
            return weight.to(dtype)
        if found.requires_grad or not torch.is_grad_enabled():  # torch 2.9 and older may have made it without
            return found
    return weight.to(dtype)
