"""What each of three processes gets of shared work, written to FOLDER/RANK.json. Arguments: FOLDER."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from sparsecod_megatron.backend import choice
from sparsecod_megatron.parallel.processes import connected_processes


def main() -> None:
    """Everything that `Processes` exchanges, with parts that three do not divide."""
    with connected_processes() as processes:
        rank = processes.rank
        made = processes.from_first(lambda: f"by {rank}")
        processes.wait()
        choice.use(choice.Choice(output=rank == 0, experts=rank == 1))
        found = {
            "size": processes.size,
            "is_first": processes.is_first,
            "no_progress": processes.no_progress,
            "gathered": processes.gather([(rank, entry) for entry in range(rank)]),
            "dealt": processes.distribute(list(range(7)), lambda parts: [[rank, part] for part in parts]),
            "total": processes.total(torch.tensor([1.0, rank])).tolist(),
            "from_first": made,
            "agreed": [str(choice.agree()), str(choice.in_use())],
        }
    Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
