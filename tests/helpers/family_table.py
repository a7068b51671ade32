"""What works with a model of each family, found by doing it to a tiny one, as a table for docs/HUGGINGFACE.md."""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import PreTrainedModel

from sparsecod_megatron.analysis.scores.context import make_context
from sparsecod_megatron.analysis.scores.registry import ASKING, BUDGETED, SCORES, find_scores
from sparsecod_megatron.compression.compress import compress
from sparsecod_megatron.compression.registry import METHODS, find_method
from sparsecod_megatron.errors import ConversionError, SparsecodError
from sparsecod_megatron.hf.families import FAMILIES
from sparsecod_megatron.hf.source import open_source
from sparsecod_megatron.models.loading import load_model
from tests.dist import families_worker, test_families
from tests.unit.hf.test_source import CONFIGS, REFUSED, save

BEGIN, END = "<!-- what works with each family: tools/family_table.py --write -->\n", "<!-- end of it -->\n"
OPEN = {family.config_class.model_type: family for family in FAMILIES if not family.extensible}
"""model_type → family, without our own."""
SCORED = tuple(name for name in SCORES if name not in (*ASKING, *BUDGETED))
"""Depth scores and sparsity metrics, without those that ask for a task or a window."""
COMPRESSED = {name: ["share=0.5"] if name == "low_rank" else [] for name in METHODS if name != "soups"}
"""Method → settings that it cannot do without; `soups` takes several models."""
LAYOUTS = {"tp2-sp": "TP2 + SP", "pp2": "PP2", "ep2": "EP2"}
TOKENS = torch.randint(3, 61, (52,), generator=torch.Generator().manual_seed(1))


@functools.cache
def works(kind: str) -> dict[str, dict[str, str]]:
    """Command → score or method → nothing where a tiny model gets it, or the line that refuses it.

    Args:
        kind: of `OPEN`.
    """
    config = next(config for config in CONFIGS.values() if config.model_type == kind)
    with TemporaryDirectory() as folder:
        directory = save(config, Path(folder))
        context = make_context(loaded(directory), TOKENS, num_samples=4, seq_length=12, seed=0)
        analyzed = {}
        for score in find_scores([name for name in SCORED if name != "experts" or "ep2" in _layouts(kind)]):
            try:
                analyzed[score.name] = "" if score.run(context).values else "no values"
            except SparsecodError as error:
                analyzed[score.name] = str(error)
        compressed = {name: _refusal(directory, name) for name in COMPRESSED}
    return {"analyze": analyzed, "compress": compressed}


def row(kind: str) -> str:
    """What `works` found, in the table's columns; everything is imported and exported."""
    cells = []
    for results in works(kind).values():
        refused = ", ".join(f"`{name}`" for name, line in results.items() if line)
        cells.append(f"all {len(results)}" if not refused else f"all {len(results)} but {refused}")
    layouts = ", ".join(LAYOUTS[layout] for layout in _layouts(kind))
    fields = ", ".join(f"`{name}`" for name in sorted(_refused_fields(kind))) or "—"
    return f"| `{kind}` | `{OPEN[kind].architecture}` | {fields} | {layouts} | {' | '.join(cells)} |"


def section() -> str:
    """All rows, and below them who refuses what, and why."""
    lines = ["| model | class | refused on import | trained on under | analyze | compress |", "|" + "---|" * 6]
    reasons: dict[tuple[str, str], list[str]] = defaultdict(list)
    for kind in OPEN:
        lines.append(row(kind))
        for results in works(kind).values():
            for name, line in results.items():
                if line:
                    reasons[name, line.replace(OPEN[kind].architecture, "the class")].append(kind)
    why = (f"- `{name}` of {', '.join(kinds)}: {line}" for (name, line), kinds in reasons.items())
    return "\n".join([*lines, "", *why, ""])


def loaded(directory: Path) -> PreTrainedModel:
    """The model in a directory, as the commands load it."""
    return load_model(directory, dtype="float32", device="cpu")


def _refusal(directory: Path, method: str) -> str:
    """What a method says of the model, if it refuses it."""
    try:
        compress(loaded(directory), find_method(method, COMPRESSED[method]), TOKENS.view(4, 13), batch_size=2)
    except SparsecodError as error:
        return str(error)
    return ""


def _layouts(kind: str) -> list[str]:
    """Those in which tests/dist/test_families.py trains the family."""
    names = [name for name, config in test_families.CONFIGS.items() if config.model_type == kind]
    return [*dict.fromkeys(layout for name in names for layout in families_worker.FAMILIES[name])]


def _refused_fields(kind: str) -> set[str]:
    """Fields of configurations that tests/unit/hf/test_source.py sees refused."""
    fields = set()
    for config in REFUSED.values():
        if config.model_type == kind:
            with TemporaryDirectory() as folder:
                config.save_pretrained(folder)
                try:
                    open_source(Path(folder))
                except ConversionError as error:
                    found = re.search(r"config\.json: (\w+)", str(error))
                    fields |= {found[1]} if found else set()
    return fields
