"""A byte-level language model of the Python standard library's sources: Gated KalmaNet in a compiled training loop.

Run it from the root of the repository with ``python -m examples.stdlib_lm``.
"""
