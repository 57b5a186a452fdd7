"""The Triton implementation. Only this package imports Triton; it is loaded when a CUDA operator first runs."""
