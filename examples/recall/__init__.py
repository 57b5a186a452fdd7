"""How well small models recall what stood in their context: Gated KalmaNet, its ablations and its peers.

Run it from the root of the repository with ``python -m examples.recall``; ``docs/recall.md`` says what is measured.
"""

import os

# As in examples.stdlib_lm: idle OpenMP threads sleep instead of spinning. Before torch starts its threads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
