"""Per-GPU launch configurations of the kernels."""
