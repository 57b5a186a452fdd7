"""The oracles, in plain PyTorch, and the CPU implementation. Imports torch and ``gka_ops.numerics`` only."""
