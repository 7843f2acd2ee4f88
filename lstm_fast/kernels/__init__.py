"""One thin file a backend: tensors in, pointers out, nothing decided.

Gates are stacked i, f, g, o. T is the storage dtype; Acc is float64 for float64, else float32. N rows over all steps
(T*B when dense), B sequences, H hidden units, D directions. Row (t, b) is ``start(t) + b``. Each backend has:

``unavailable() -> str | None``
    None if it can run in this process, else what is missing.
``refuses(device, dtype, hidden) -> str | None``
    None if it serves tensors of that kind with H = ``hidden``, else why not.
``recurrence_forward(gates, h0, c0, w_hh, steps, y, h_n, c_n, cells)``
    F1-F6 over all steps. ``steps``: active sequences of each step, never growing, all above 0. ``gates`` [D, N, 4H] T:
    on entry the input product with both biases; on return the activated gates, unless ``cells`` is None. ``h0``,
    ``c0`` [D, B, H] T; ``w_hh``: D tensors [4H, H] T. Written: ``y`` [N, D*H] T, direction d in columns d*H to (d+1)*H;
    ``h_n``, ``c_n`` [D, B, H] T; ``cells`` [D, N, H] Acc, or None for inference. Direction 1 walks from the last to
    the first step.
``recurrence_backward(gates, cells, c0, w_hh, steps, dy, dh, dc, dgates)``
    B1-B7 over all steps. ``dy`` [N, D*H] T, or None for zero. ``dh``, ``dc`` [D, B, H] Acc: on entry the gradients of
    h_n and c_n, on return those of h0 and c0. Written: ``dgates`` [D, N, 4H] T, the gradient of the pre-activations.

All tensors are contiguous, nothing but what is named as written is written, and results are the same bits on every run.
"""
