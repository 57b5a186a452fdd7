"""A byte-level language model of the Python standard library's sources: Gated KalmaNet in a compiled training loop.

Run it from the root of the repository with ``python -m examples.stdlib_lm``.
"""

import os

# Idle OpenMP threads sleep instead of spinning: where other programs compete for the cores, spinning makes the many
# small operations of the CPU preset ten times slower. It must be set before torch starts its threads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
