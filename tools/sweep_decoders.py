"""Every score of every causal language model of transformers that can be made tiny, or their pruning with --stream.

Anything but numbers (with --stream, those of the whole model) or a refusal in one line is a fault: exit status 1.

    bash tools/run_in_venv.sh python tools/sweep_decoders.py [FAMILY ...] [--scores A,B] [--stream]

A developer runs it after a new release of transformers; the suite tests one family for each structure of a block.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tests/ is not part of the installed package

import transformers

from sparsecod_megatron.analysis.scores.registry import SCORES
from tests.helpers.decoders import FAMILIES, outcomes
from tests.helpers.streaming import streaming_outcome


def main() -> int:
    """Print one line per family and one line per refusal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="all by default")
    parser.add_argument("--scores", default=",".join(SCORES), metavar="A,B", help="all by default")
    parser.add_argument("--stream", action="store_true", help="prune with one block in memory instead")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    failed = []
    for family in args.families or FAMILIES:
        try:
            found = streamed(family) if args.stream else outcomes(family, args.scores.split(","))
        except Exception:
            failed.append(family)
            print(f"{family}: FAILED\n{traceback.format_exc()}", flush=True)
            continue
        if not isinstance(found, dict):
            print(f"{family}: {found or 'cannot be made tiny'}", flush=True)
            continue
        refused = [f"\n  {name}: {line}" for name, line in found.items() if line]
        print(f"{family}: {len(found) - len(refused)} of {len(found)} scores{''.join(refused)}", flush=True)
    print(f"{len(failed)} failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


def streamed(family: str) -> str:
    """What is said of streaming a family."""
    with tempfile.TemporaryDirectory() as folder:
        line = streaming_outcome(family, Path(folder))
    return "cannot be made tiny, or pruned" if line is None else line or "streamed as whole"


if __name__ == "__main__":
    sys.exit(main())
