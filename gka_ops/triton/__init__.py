"""The Triton implementation. Nothing outside this package imports Triton, and nothing here runs before a CUDA op does."""
