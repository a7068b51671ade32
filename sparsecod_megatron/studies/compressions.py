"""One compression or many of the same model, all with the same calibration sequences, scored windows and seed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsecod_megatron import __version__
from sparsecod_megatron.analysis.analyze import analyze, write_analysis
from sparsecod_megatron.analysis.compare import compare
from sparsecod_megatron.analysis.compressions import DENSE, USEFULNESS_BY_BLOCK
from sparsecod_megatron.analysis.scores.context import make_context
from sparsecod_megatron.analysis.scores.registry import find_scores
from sparsecod_megatron.compression.calibration import Text, split_text
from sparsecod_megatron.compression.compress import Compression, compress, write_model
from sparsecod_megatron.compression.method import Method
from sparsecod_megatron.compression.registry import find_method, method_class
from sparsecod_megatron.errors import ConfigError
from sparsecod_megatron.evaluation.corpus import read_corpus
from sparsecod_megatron.evaluation.perplexity import score_windows, summary
from sparsecod_megatron.evaluation.result import ModelResult
from sparsecod_megatron.files import making_output, write_text
from sparsecod_megatron.hf.residency import Residency
from sparsecod_megatron.models.opening import Opened, open_model
from sparsecod_megatron.parallel.processes import Processes
from sparsecod_megatron.studies.compression_rows import compression_row, measured, report_of, scored_result
from sparsecod_megatron.studies.peak_memory import peak_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WEIGHTS = ("*.safetensors", "*.distcp", "*.bin")
"""Files of models and of checkpoints."""
_NOT_OF_A_ROW = ("output", "keep", "overwrite", "stream")
"""Fields of a request that change nothing in a row."""
MAX_SCORED = 64
"""Sequences of the depth scores, at most as many as for perplexity."""


@dataclass(frozen=True)
class Request:
    """What all rows have in common.

    Attributes:
        models: the model, and further ones for a method that takes several.
        data: dataset prefix or text.
        output: directory to write.
        samples: calibration sequences.
        held_out: sequences for perplexity.
        seq_length: tokens of a sequence.
        seed: seed of sample and intervals.
        batch_size: sequences per forward pass.
        dtype: `float32` or `bfloat16`.
        device: `cpu`, `cuda`, or None for cuda where there is one.
        verify: whether the export of a training run is compared with Megatron's logits.
        scores: depth scores to measure before and after.
        keep: whether models are written.
        overwrite: whether model directories that are there may be replaced.
        stream: whether a block is in memory only while it is needed, with the same results.
    """

    models: tuple[Path, ...]
    data: Path
    output: Path
    samples: int
    held_out: int
    seq_length: int
    seed: int
    batch_size: int
    dtype: str
    device: str | None
    verify: bool
    scores: tuple[str, ...] = ()
    keep: bool = True
    overwrite: bool = False
    stream: bool = False

    def open(self, path: Path, processes: Processes) -> Opened:
        """A model with derivatives. Collective."""
        beside = self.output.absolute().parent if self.stream else None
        options = {"dtype": self.dtype, "device": self.device, "verify": self.verify, "streams": beside}
        return open_model(path, restored=False, processes=processes, **options)  # type: ignore[arg-type]

    def settings(self) -> dict[str, Any]:
        """What `compression.json` says of it."""
        names = ("data", "samples", "held_out", "seq_length", "seed", "batch_size", "dtype")
        model = self.models[0] if len(self.models) == 1 else self.models
        return {"model": model, **{name: getattr(self, name) for name in names}}

    @functools.cached_property
    def _files(self) -> list[tuple[str, int, int]]:
        """Those of models and data, sorted, as they are when a command first asks."""
        weights = [path for model in self.models for kind in _WEIGHTS for path in model.rglob(kind)]
        paths = [*weights, *self.data.parent.glob(f"{self.data.name}*")]
        return sorted((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths)

    def digest(self, cell: Cell | None) -> str:
        """What stands for everything that a row depends on; files count by size and time of change."""
        common = {key: value for key, value in asdict(self).items() if key not in _NOT_OF_A_ROW}
        own = None if cell is None else (cell.method.name, asdict(cell.method.settings))
        text = json.dumps([common, self._files, own, __version__], default=str, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Cell:
    """A row to make.

    Attributes:
        method: with its settings.
        pattern: as given, or empty for a method without.
    """

    method: Method
    pattern: str

    @property
    def name(self) -> str:
        """The name of its directory."""
        return f"{self.method.name}_{self.pattern.replace(':', '-')}" if self.pattern else self.method.name


def make_cells(methods: Sequence[str], patterns: Sequence[str], settings: Sequence[str]) -> list[Cell]:
    """Every method with every pattern, or once where it has none.

    Args:
        methods: names.
        patterns: of pruning; none leaves the settings' own.
        settings: `key=value`; each goes to the methods that have the key.

    Raises:
        ConfigError: an unknown method, a key that none of them has, a value out of bounds, or a row that stands twice.
    """
    known = {name: {item.name for item in dataclasses.fields(method_class(name).Settings)} for name in methods}
    for setting in settings:
        key = setting.partition("=")[0]
        if len(methods) > 1 and not any(key in keys for keys in known.values()):
            raise ConfigError(f"--set {setting}: none of {', '.join(methods)} has this setting; leave it out")
    if patterns and not any("pattern" in keys for keys in known.values()):
        raise ConfigError(f"--pattern {','.join(patterns)}: --method {','.join(methods)} has none; leave it out")
    cells = []
    for name in methods:
        own = [entry for entry in settings if len(methods) == 1 or entry.partition("=")[0] in known[name]]
        for pattern in patterns if "pattern" in known[name] and patterns else [""]:
            # A share's `per` is not for an n:m beside it.
            is_neighbours = len(patterns) > 1 and ":" in pattern and not pattern.startswith("group")
            fitting = [entry for entry in own if not (is_neighbours and entry.startswith("per="))]
            method = find_method(name, [*fitting, *([f"pattern={pattern}"] if pattern else [])])
            cells.append(Cell(method, getattr(method.settings, "pattern", "")))
    twice = [cell.name for number, cell in enumerate(cells) if cell.name in [other.name for other in cells[:number]]]
    if twice:
        raise ConfigError(f"--method, --pattern: {twice[0]} stands twice; name each once")
    return cells


def compress_once(request: Request, cell: Cell, processes: Processes) -> tuple[Compression, dict[str, Any]]:
    """Compress a model into `request.output`. Collective.

    Returns:
        What became of it, and the report that is beside it.

    Raises:
        SparsecodError: arguments, model or data that cannot be used, or nothing that could be compressed.
    """
    work = request.output.absolute().with_name(f".{request.output.name}.work")
    with request.open(request.models[0], processes) as opened, _making(request, request.output, processes) as folder:
        text = _text(request, opened)
        before = _scored(request, "before", opened.residency, text, processes)
        compression, _ = _compressed(request, cell, opened, text, work, processes)
        after = _scored(request, "after", compression.scored_residency, text, processes)
        report = report_of(compression, request.settings(), before, after)
        if folder is not None:
            _write(compression, opened, folder, report)
    if processes.is_first:
        shutil.rmtree(work, ignore_errors=True)
    return compression, report


def compress_all(request: Request, cells: Sequence[Cell], processes: Processes) -> Iterator[dict[str, Any]]:
    """The dense row, then one for each cell, each as soon as it is measured. Collective.

    Rows that an earlier call with the same request left in the output are taken from there.

    Raises:
        SparsecodError: as `compress_once`.
    """
    text: Text | None = None

    def text_of(opened: Opened) -> Text:
        nonlocal text  # the tokenizer is every row's, and long texts take minutes
        if text is None:
            text = _text(request, opened)
        return text

    with request.open(request.models[0], processes) as original:
        dense = _kept(request, None, DENSE, processes)
        if dense is None:
            dense = _dense_row(request, original.directory, text_of, processes)
        yield dense
        for cell in cells:
            row = _kept(request, cell, cell.name, processes)
            yield row or _row(request, cell, original.directory, text_of, dense, processes)
    if processes.is_first:
        shutil.rmtree(request.output / ".work", ignore_errors=True)


def _dense_row(
    request: Request, directory: Path, text_of: Callable[[Opened], Text], processes: Processes
) -> dict[str, Any]:
    with request.open(directory, processes) as opened:
        residency, text = opened.residency, text_of(opened)
        result = _scored(request, DENSE, residency, text, processes)
        row = {"method": DENSE, "pattern": "", "warnings": [], **measured(residency, result)}
        row |= _analyzed(request, DENSE, residency.model, text, processes)
    _keep(request, None, DENSE, row, processes)
    return row


def _row(
    request: Request,
    cell: Cell,
    directory: Path,
    text_of: Callable[[Opened], Text],
    dense: dict[str, Any],
    processes: Processes,
) -> dict[str, Any]:
    before, folder_name = scored_result(dense), request.output / cell.name
    with request.open(directory, processes) as opened, _making(request, folder_name, processes) as folder:
        text = text_of(opened)
        compression, cost = _compressed(request, cell, opened, text, request.output / ".work" / cell.name, processes)
        after = _scored(request, cell.name, compression.scored_residency, text, processes)
        by_block = _analyzed(request, cell.name, compression.scored, text, processes)
        row = compression_row(compression, cell.pattern, before, after, cost) | by_block
        if folder is not None:
            _write(compression, opened, folder, report_of(compression, request.settings(), before, after))
        if request.scores:
            found = compare(*(request.output / "analysis" / name for name in (DENSE, cell.name)))
            row["scores"] = [asdict(difference) for difference in found]
        # Before the directory is there, without which the row does not count.
        _keep(request, cell, cell.name, row, processes)
    return row


def _text(request: Request, opened: Opened) -> Text:
    return split_text(
        read_corpus(request.data, opened.tokenizer).tokens,
        num_samples=request.samples,
        num_held_out=request.held_out,
        seq_length=request.seq_length,
        vocab_size=opened.model.config.get_text_config().vocab_size,
        seed=request.seed,
    )


def _scored(request: Request, name: str, residency: Residency, text: Text, processes: Processes) -> ModelResult:
    windows = score_windows(
        residency.model,
        text.held_out,
        seq_length=request.seq_length,
        batch_size=request.batch_size,
        processes=processes,
        residency=residency,
    )
    return ModelResult(name, perplexity=summary(windows, seed=request.seed), windows=windows)


def _compressed(
    request: Request, cell: Cell, opened: Opened, text: Text, work: Path, processes: Processes
) -> tuple[Compression, dict[str, Any]]:
    """The compression, and its seconds and the peak of memory in bytes, the largest of the processes."""

    def further(path: Path) -> PreTrainedModel:
        with request.open(path, processes) as other:
            return other.model  # gone when nobody holds it any more

    start = time.perf_counter()
    with peak_memory(opened.model.device) as peak:
        compression = compress(
            opened.model,
            cell.method,
            text.calibration,
            batch_size=request.batch_size,
            others=(further(path) for path in request.models[1:]),
            processes=processes,
            work=work / request.digest(cell),
            residency=opened.residency,
        )
    cost = {"seconds": time.perf_counter() - start, "peak_memory_bytes": max(processes.gather([peak.num_bytes]))}
    return compression, cost


def _analyzed(
    request: Request, name: str, model: PreTrainedModel, text: Text, processes: Processes
) -> dict[str, list[float]]:
    """Write the depth scores of a row's model as an analysis directory; the usefulness of each block. Collective."""
    if not request.scores:
        return {}
    context = make_context(
        model,
        text.held_out,
        num_samples=min(MAX_SCORED, len(text.held_out) // (request.seq_length + 1)),
        seq_length=request.seq_length,
        seed=request.seed,
        processes=processes,
    )
    settings = {"model": f"{request.models[0]} {name}", "data": str(request.data)}
    analysis = analyze(context, find_scores(list(request.scores)), settings=settings)
    if processes.is_first:
        write_analysis(analysis, request.output / "analysis" / name)
    processes.wait()
    if "usefulness" not in analysis.results:
        return {}
    return {USEFULNESS_BY_BLOCK: [row["usefulness"] for row in analysis.results["usefulness"].tables["usefulness"]]}


@contextlib.contextmanager
def _making(request: Request, folder: Path, processes: Processes) -> Iterator[Path | None]:
    """The directory to fill, on the first process, where models are kept."""
    if not request.keep or not processes.is_first:
        yield None
        return
    with making_output(folder, overwrite=request.overwrite) as made:
        yield made


def _write(compression: Compression, opened: Opened, folder: Path, report: dict[str, Any]) -> None:
    write_model(compression, opened.tokenizer, opened.directory, folder)
    (folder / "compression.json").write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")


def _keep(request: Request, cell: Cell | None, name: str, row: dict[str, Any], processes: Processes) -> None:
    """Leave a row in the output, for a call that continues."""
    if processes.is_first:
        content = {"digest": request.digest(cell), "row": row}
        write_text(request.output / "rows" / f"{name}.json", json.dumps(content, indent=1) + "\n")


def _kept(request: Request, cell: Cell | None, name: str, processes: Processes) -> dict[str, Any] | None:
    """A row of an earlier call with the same request. Collective."""

    def read() -> dict[str, Any] | None:
        path = request.output / "rows" / f"{name}.json"
        written = cell is None or not request.keep or (request.output / name / "config.json").is_file()
        if not path.is_file() or not written:
            return None
        content = json.loads(path.read_text(encoding="utf-8"))
        return content["row"] if content["digest"] == request.digest(cell) else None

    return processes.from_first(read)
