"""Weight sparsity of a model: `sparsecod analyze` with the `weights` score alone.

    python tools/analyze_weight_sparsity.py MODEL_DIR --data PREFIX_OR_TEXT --output DIR

Shares of small weights by two yardsticks, Hoyer and Gini of every matrix, and the curve of global magnitude pruning.
All other options of `sparsecod analyze` are accepted.
"""

from __future__ import annotations

import sys

from sparsecod_megatron.cli.main import main

if __name__ == "__main__":
    if set(sys.argv[1:]) <= {"-h", "--help"}:
        print(__doc__)
    sys.exit(main(["analyze", "--scores", "weights", *sys.argv[1:]]))
