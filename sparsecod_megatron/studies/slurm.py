"""A study on a cluster: one training job a cell, a small job behind each that scores it, and one that makes the table.

Everything is written down as a shell script first, so that it can be read, and a part of it submitted again by hand.
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from sparsecod_megatron.config import save_config
from sparsecod_megatron.config.run_files import CONFIG_FILE
from sparsecod_megatron.errors import ConfigError
from sparsecod_megatron.evaluation.files import write_text
from sparsecod_megatron.studies.grid import RUN_FOLDER, Cell, Study

SCRIPT = "submit.sh"


def write_jobs(study: Study, cells: Sequence[Cell], command: Sequence[str]) -> Path:
    """Write `submit.sh`, and every cell's config.yaml.

    Args:
        study: the study.
        cells: those to run.
        command: arguments of `sparsecod` for this study, without `--cell`.

    Returns:
        The script; it runs in the present folder.

    Raises:
        ConfigError: the job script is not there.
    """
    slurm = study.config.launch.slurm
    if not Path(slurm.script).is_file():
        raise ConfigError(
            f"launch.slurm.script: {slurm.script}: no such file; start in the folder that its path is from"
        )
    lines = [
        "#!/usr/bin/env bash",
        f"# Jobs of the study {study.config.name}: a training a cell, a scoring behind it, the table behind them all.",
        "set -euo pipefail",
        f"cd {shlex.quote(str(Path.cwd()))}",
        "scored=",
    ]
    for cell in cells:
        cell.directory.mkdir(parents=True, exist_ok=True)
        save_config(cell.config, cell.directory / CONFIG_FILE)
        lines += _cell_lines(cell, slurm.nodes, slurm.script, slurm.options, slurm.score_options, command)
    table = _sbatch(f"{study.config.name}-table", study.output, slurm.score_options, wrap=[*command, "--table"])
    lines.append(table.replace("sbatch", 'sbatch --dependency="afterany$scored"', 1))
    write_text(study.output / SCRIPT, "\n".join(lines) + "\n")
    return study.output / SCRIPT


def submit(script: Path) -> list[str]:
    """Run the script; returns what sbatch printed, the jobs' numbers.

    Raises:
        ConfigError: there is no sbatch, or it refuses a job.
    """
    try:
        done = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=True)
    except subprocess.CalledProcessError as error:
        words = error.stderr.strip().splitlines() or [f"status {error.returncode}"]
        raise ConfigError(f"{script}: sbatch refused a job ({words[-1]}); the jobs before it are submitted") from None
    return done.stdout.split()


def _cell_lines(
    cell: Cell, nodes: int, script: str, options: Sequence[str], score_options: Sequence[str], command: Sequence[str]
) -> list[str]:
    run = cell.directory.resolve() / RUN_FOLDER
    train = shlex.join(
        [
            "sbatch",
            "--parsable",
            f"--job-name={cell.name}",
            f"--nodes={nodes}",
            f"--output={cell.directory}/train-%j.log",
            f"--export=ALL,RUN_DIR={run}",
            *options,
            script,
            str(cell.directory / CONFIG_FILE),
        ]
    )
    score = _sbatch(f"{cell.name}-score", cell.directory, score_options, wrap=[*command, "--cell", cell.name])
    return [
        f"job=$({train})",
        'echo "$job"',
        f"scored+=:$({score.replace('sbatch', 'sbatch --dependency=afterok:$job', 1)})",
    ]


def _sbatch(name: str, folder: Path, options: Sequence[str], *, wrap: Sequence[str]) -> str:
    """A job that runs one `sparsecod` command."""
    inner = shlex.join(["bash", "tools/run_in_venv.sh", "sparsecod", *wrap])
    return shlex.join(
        ["sbatch", "--parsable", f"--job-name={name}", f"--output={folder}/%x-%j.log", *options, f"--wrap={inner}"]
    )
