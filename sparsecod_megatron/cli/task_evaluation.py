"""lm-eval's tasks on the checkpoints of a run that is training: `sparsecod eval` as a function that the loop calls."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sparsecod_megatron.config import EvaluationConfig


def task_evaluator(section: EvaluationConfig, device: str) -> Callable[[Path], dict[str, float]]:
    """Load the tasks, so that what they lack is found before training, and return what evaluates a step directory.

    The numbers are those of `sparsecod eval` with the same tasks and limit: float32, one process.

    Args:
        section: what to evaluate.
        device: `cpu` or `cuda`.

    Returns:
        A function from a step directory to `task/NAME/METRIC` and, where there is a standard error,
        `task/NAME/METRIC_stderr`.

    Raises:
        ConfigError: lm-eval is not installed, or a task is unknown.
        DataError: a task's data cannot be loaded.
    """
    from sparsecod_megatron.evaluation.harness import load_tasks, run_tasks
    from sparsecod_megatron.models.opening import open_model

    include_paths = [Path(section.include_path)] if section.include_path else []
    loaded = load_tasks(section.tasks, include_paths=include_paths)
    compared: list[Path] = []

    def evaluate(step_dir: Path) -> dict[str, float]:
        # Later checkpoints of the run differ from the first in their numbers alone.
        with open_model(step_dir, device=device, verify=not compared) as opened:
            compared.append(step_dir)
            model, tokenizer = opened.model, opened.tokenizer
            result = run_tasks(model, tokenizer, loaded, limit=section.limit, batch_size=section.batch_size)
            del model
        values = {}
        for row in result.metrics:
            values[f"task/{row.task}/{row.metric}"] = row.value
            if row.stderr is not None:
                values[f"task/{row.task}/{row.metric}_stderr"] = row.stderr
        return values

    return evaluate
