"""`sparsecod plan`: parameters, operations, memory, communication and step time of a run that has not started."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsecod_megatron.cli.options import check_at_least

if TYPE_CHECKING:
    from sparsecod_megatron.config import RunConfig
    from sparsecod_megatron.planning.hardware import Gpu

HELP = "Say what a run needs on N GPUs and how long a step may take, or search for the layouts that fit."
EXAMPLE = "sparsecod plan examples/configs/moe_1B_7B.yaml --gpus 16 --gpu h100 --search"
LAYOUTS_SHOWN = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `sparsecod plan`."""
    parser.add_argument("config", help="YAML file (examples/configs)")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="values that replace the file's")
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="number of GPUs, eight per node")
    parser.add_argument("--gpu", choices=("h100", "h200"), default="h100", help="kind of GPU (default h100)")
    parser.add_argument(
        "--search",
        action="store_true",
        help=f"show the {LAYOUTS_SHOWN} fastest layouts that fit with 10 %% of memory to spare, whatever the file says",
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="also write everything as JSON; replaced")


def run(args: argparse.Namespace) -> None:
    """Print the plan, or the found layouts.

    Raises:
        SparsecodError: a layout that cannot run or does not fit; nothing is printed or written then.
    """
    from sparsecod_megatron.config import load_config
    from sparsecod_megatron.mechanisms import MECHANISMS
    from sparsecod_megatron.planning import GPUS
    from sparsecod_megatron.planning.report import write_json
    from sparsecod_megatron.planning.vocabulary import with_vocabulary

    check_at_least(args, gpus=1)
    config, note = with_vocabulary(load_config(args.config, args.overrides, mechanisms=MECHANISMS))
    text, content = (_search if args.search else _plan)(config, args.gpus, GPUS[args.gpu])
    if args.output is not None:
        write_json({**content, "note": note}, args.output)
    print(text)
    if note is not None:
        print(f"\nnote: {note}")
    if args.output is not None:
        print(f"\nwrote {args.output}")


def _plan(config: RunConfig, gpus: int, gpu: Gpu) -> tuple[str, dict[str, Any]]:
    from sparsecod_megatron.planning import make_plan, require_fit
    from sparsecod_megatron.planning.report import plan_json, plan_text

    plan = make_plan(config, gpus, gpu)
    require_fit(plan)
    return plan_text(plan), plan_json(plan)


def _search(config: RunConfig, gpus: int, gpu: Gpu) -> tuple[str, dict[str, Any]]:
    from sparsecod_megatron.planning import search_layouts
    from sparsecod_megatron.planning.report import search_json, search_text

    candidates = search_layouts(config, gpus, gpu)
    return search_text(candidates, gpu, limit=LAYOUTS_SHOWN), {"gpus": gpus, "layouts": search_json(candidates)}
