"""Weight sparsity of several models, such as runs that differ in weight decay, in one table.

    python tools/analyze_weight_decay_sparsity.py A B C --weight-decay 0 0.1 1 --lr 1e-3 --output DIR

Writes DIR/weight_decay_sparsity.csv and .json: for every model, all matrices together and each kind, the shares below ε
of the initial and of the matrix's own standard deviation, Hoyer and Gini. `equilibrium_std` is √(lr/2·decay).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from sparsecod_megatron.analysis.sparsity.decay import as_csv, decay_rows, match_decays
from sparsecod_megatron.errors import SparsecodError
from sparsecod_megatron.files import check_writable, write_text
from sparsecod_megatron.models.opening import open_model

COLUMNS = ("std", "equilibrium_std", "below_init_1e-02", "below_own_1e-02", "hoyer", "gini")


def main() -> int:
    """Read the models one after another and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL_DIR", help="model directories or training runs")
    parser.add_argument("--weight-decay", type=float, nargs="+", default=[], help="of each model, in the same order")
    parser.add_argument("--lr", type=float, help="learning rate of all models, for the predicted equilibrium")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    args = parser.parse_args()
    try:
        check_writable(args.output)
        rows = []
        for path, decay in zip(args.models, match_decays(len(args.models), args.weight_decay), strict=True):
            with open_model(path, device="cpu", restored=False, reads_text=False) as opened:
                rows += decay_rows(opened.model, label=str(path), weight_decay=decay, lr=args.lr)
        write_text(args.output / "weight_decay_sparsity.csv", as_csv(rows))
        write_text(args.output / "weight_decay_sparsity.json", json.dumps(rows, indent=1))
    except SparsecodError as error:
        print(f"analyze_weight_decay_sparsity: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{'model':32} {'decay':>8} " + " ".join(f"{name:>16}" for name in COLUMNS))
    for row in (row for row in rows if row["kind"] == "all"):
        numbers = " ".join(f"{'-' if row[name] is None else format(row[name], '.4g'):>16}" for name in COLUMNS)
        print(f"{row['model'][-32:]:32} {'-' if row['weight_decay'] is None else row['weight_decay']:>8} {numbers}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
