"""Arguments of `tools/gpu_bring_up.sh`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tools.gpu_bring_up.steps import LIMIT_S, STEPS

EPILOG = """\
before, here:             bash tools/run_in_venv.sh bash tools/gpu_bring_up.sh --pack build/gpu --archive TE.tar.gz
on the card's machine:    bash tools/gpu_bring_up.sh build/gpu OUTPUT
after, with the results:  bash tools/gpu_bring_up.sh --publish OUTPUT
"""


def main() -> int:
    """Run, pack or publish."""
    parser = argparse.ArgumentParser(
        prog="gpu_bring_up.sh",
        description="Prove on one GPU, in at most nine minutes, what no CPU can; rehearse it on a machine without one.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", nargs="?", type=Path, help="what --pack made")
    parser.add_argument("output", nargs="?", type=Path, help="folder of results.json, table.md, log.txt, profile.txt")
    names = [step.name for step in STEPS]
    parser.add_argument("--only", nargs="+", choices=names, default=[], metavar="STEP", help=f"of {', '.join(names)}")
    parser.add_argument("--seconds", type=float, default=LIMIT_S, help="of all (default %(default)s)")
    parser.add_argument("--pack", type=Path, metavar="FOLDER", help="fill FOLDER for a machine without a network")
    parser.add_argument("--archive", type=Path, help="with --pack: Transformer Engine, built for that machine")
    parser.add_argument("--publish", type=Path, metavar="OUTPUT", help="put a card's table into docs/GPU.md")
    args = parser.parse_args()
    if args.pack is not None:
        from tools.gpu_bring_up.pack import Contents, pack

        print(pack(args.pack, Contents(archive=args.archive)))
        return 0
    if args.publish is not None:
        from tools.gpu_bring_up.results import publish

        publish(args.publish)
        return 0
    if args.folder is None or args.output is None:
        parser.error("give FOLDER and OUTPUT, or --pack or --publish")
    from tools.gpu_bring_up.run import bring_up

    return 0 if bring_up(args.folder, args.output, only=args.only, limit_s=args.seconds) else 1


if __name__ == "__main__":
    sys.exit(main())
