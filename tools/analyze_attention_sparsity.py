"""Attention sparsity of a model: `sparsecod analyze` with the `attention` score alone.

    python tools/analyze_attention_sparsity.py MODEL_DIR --data PREFIX_OR_TEXT --output DIR

Small mass, Σα², entropy, keys for 95 % of the mass and sink mass of every head. All other options of
`sparsecod analyze` are accepted.
"""

from __future__ import annotations

import sys

from sparsecod_megatron.cli.main import main

if __name__ == "__main__":
    if set(sys.argv[1:]) <= {"-h", "--help"}:
        print(__doc__)
    sys.exit(main(["analyze", "--scores", "attention", *sys.argv[1:]]))
