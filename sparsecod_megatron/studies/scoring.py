"""What is done with a trained cell: exported, its depth scores and sparsity, held-out text and tasks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sparsecod_megatron.config import DataConfig
from sparsecod_megatron.errors import ConfigError
from sparsecod_megatron.studies.schema import HeldOutConfig, ScoresConfig

if TYPE_CHECKING:
    from sparsecod_megatron.analysis.tasks.request import TaskRequest

MODEL_FOLDER, ANALYSIS_FOLDER, EVALUATION_FOLDER = "hf", "analysis", "eval"
"""What the three make beside each other, of a cell or one of its earlier checkpoints."""


def export(run: Path, output: Path, *, verify: bool) -> None:
    """Write a run's last checkpoint as a HuggingFace directory.

    Args:
        run: its directory.
        output: directory to make.
        verify: compare the logits with Megatron's first.

    Raises:
        SparsecodError: a checkpoint that is missing, damaged, or that HuggingFace cannot express.
    """
    from sparsecod_megatron.backend import select_backend

    select_backend()
    from sparsecod_megatron.checkpoint.exported import export_checkpoint

    export_checkpoint(run, output, verify=verify)


def score(settings: ScoresConfig, data: DataConfig, model_directory: Path, output: Path) -> None:
    """Write the analysis directory of an exported model; nothing where it is there or no score is asked for.

    The sample is drawn from the first validation source; scores that ask for answers take `settings.task` alone.

    Raises:
        SparsecodError: scores, data, task or model that cannot be used.
    """
    from sparsecod_megatron.analysis.analyze import analyze, write_analysis
    from sparsecod_megatron.analysis.directory import is_analysis
    from sparsecod_megatron.analysis.scores.registry import find_scores, needs_text
    from sparsecod_megatron.models.measured import context_of
    from sparsecod_megatron.models.opening import open_model

    if not settings.names or is_analysis(output):
        return
    scores = find_scores(settings.names)
    source = held_out_text(data) if needs_text(settings.names) else None
    with open_model(model_directory, restored=False) as opened:
        context = context_of(
            opened,
            settings.names,
            model=str(model_directory),
            text=source,
            task=requested_task(settings),
            data=data,
            num_samples=settings.samples,
            seq_length=settings.seq_length,
            seed=settings.seed,
            memory_gib=settings.memory_gib,
        )
    sources = {"data": source, "task": settings.task}
    facts = {key: str(value) for key, value in sources.items() if value is not None}
    write_analysis(analyze(context, scores, settings={"model": str(model_directory), **facts}), output)


def requested_task(settings: ScoresConfig) -> TaskRequest | None:
    """The task that the scores ask; None without one.

    Raises:
        ConfigError: a task that no score asks, a score without its task, or difficulties that cannot be.
    """
    from sparsecod_megatron.analysis.tasks.request import TaskRequest, check_task

    check_task(settings.names, settings.task, settings.difficulties)
    if settings.task is None:
        return None
    return TaskRequest(settings.task, settings.samples, settings.seed, tuple(settings.difficulties))


def evaluate(settings: HeldOutConfig, data: DataConfig, model_directory: Path, output: Path) -> None:
    """Write the evaluation directory of an exported model; nothing where it is there, or for a synthetic task.

    Raises:
        SparsecodError: tasks, data or model that cannot be used.
    """
    from sparsecod_megatron.evaluation.corpus import read_corpus
    from sparsecod_megatron.evaluation.harness import load_tasks, run_tasks
    from sparsecod_megatron.evaluation.perplexity import score_windows, summary
    from sparsecod_megatron.evaluation.report import write_report
    from sparsecod_megatron.evaluation.result import ModelResult
    from sparsecod_megatron.models.opening import open_model

    if data.synthetic or (output / "results.json").is_file():
        return
    with open_model(model_directory) as opened:
        model, tokenizer = opened.model, opened.tokenizer
    source, length = held_out_text(data), data.seq_length
    max_tokens = None if settings.windows is None else settings.windows * length
    corpus = read_corpus(source, tokenizer, max_tokens=max_tokens)
    windows = score_windows(model, corpus.tokens, seq_length=length, batch_size=settings.batch_size)
    tasks = None
    if settings.tasks:
        folders = [Path(settings.include_path)] if settings.include_path else []
        loaded = load_tasks(settings.tasks, include_paths=folders)
        tasks = run_tasks(model, tokenizer, loaded, limit=settings.limit, batch_size=settings.batch_size)
    name = str(model_directory)
    result = ModelResult(name, summary(windows, num_bytes=corpus.num_bytes), windows, tasks)
    write_report(output, {"model": name, "perplexity": str(source), "tasks": settings.tasks}, [result])


def held_out_text(data: DataConfig) -> Path:
    """Token files of the run's first validation source.

    Raises:
        ConfigError: it has none.
    """
    validation = data.validation
    sources = (
        [entry for entry in validation if isinstance(entry, str)] if isinstance(validation, list) else [validation]
    )
    if not sources or not isinstance(sources[0], str):
        raise ConfigError("data.validation: not set; a study scores held-out text: set run.data.prefix=PREFIX")
    return Path(sources[0])
