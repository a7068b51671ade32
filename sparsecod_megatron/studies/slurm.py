"""A study on a cluster: one training job per cell, a small job after each that scores it, and one that makes the table.

Everything is written down as a shell script first, so that it can be read, and a part of it submitted again by hand.
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from sparsecod_megatron.config.run_files import CONFIG_FILE
from sparsecod_megatron.errors import ConfigError
from sparsecod_megatron.files import write_text
from sparsecod_megatron.studies.cell import trained_run, write_config
from sparsecod_megatron.studies.grid import Cell, Study
from sparsecod_megatron.studies.schema import SlurmConfig

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
        ConfigError: the job script is not there, or a cell's folder holds another run.
    """
    slurm = study.config.launch.slurm
    if not Path(slurm.script).is_file():
        raise ConfigError(
            f"launch.slurm.script: {slurm.script}: no such file; start in the folder that its path is from"
        )
    lines = [
        "#!/usr/bin/env bash",
        f"# Jobs of the study {study.config.name}: a training per cell, a scoring after each, then the table.",
        "set -euo pipefail",
        f"cd {shlex.quote(str(Path.cwd()))}",
        "scored=",
    ]
    for cell in cells:
        write_config(cell)
        lines += _cell_lines(cell, slurm, command)
    table = _wrapped(f"{study.config.name}-table", study.output, slurm, [*command, "--table"])
    lines.append(_sbatch(table, after='"afterany$scored"'))
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


def _cell_lines(cell: Cell, slurm: SlurmConfig, command: Sequence[str]) -> list[str]:
    train = [
        f"--job-name={cell.name}",
        f"--nodes={slurm.nodes}",
        f"--output={cell.directory}/train-%j.log",
        f"--export=ALL,RUN_DIR={trained_run(cell).resolve()}",
        *slurm.options,
        slurm.script,
        str(cell.directory / CONFIG_FILE),
    ]
    score = _wrapped(f"{cell.name}-score", cell.directory, slurm, [*command, "--cell", cell.name])
    return [f"job=$({_sbatch(train)})", 'echo "$job"', f"scored+=:$({_sbatch(score, after='afterok:$job')})"]


def _wrapped(name: str, folder: Path, slurm: SlurmConfig, command: Sequence[str]) -> list[str]:
    """sbatch's arguments for a job that runs one `sparsecod` command."""
    inner = shlex.join(["bash", "tools/run_in_venv.sh", "sparsecod", *command])
    return [f"--job-name={name}", f"--output={folder}/%x-%j.log", *slurm.score_options, f"--wrap={inner}"]


def _sbatch(arguments: Sequence[str], *, after: str = "") -> str:
    """The shell command of a job; `after`, in the shell's own words, is what it depends on."""
    dependency = f"--dependency={after} " if after else ""
    return f"sbatch --parsable {dependency}{shlex.join(arguments)}"
