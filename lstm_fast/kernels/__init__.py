"""One thin file for each kernel backend: tensors in, pointers out, nothing decided."""
