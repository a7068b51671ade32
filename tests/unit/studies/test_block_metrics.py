"""Numbers of single blocks in a study's metrics: those of the score's own table, with their intervals."""

from __future__ import annotations

from pathlib import Path

from sparsecod_megatron.analysis.analyze import analyze, write_analysis
from sparsecod_megatron.analysis.scores.registry import find_scores
from sparsecod_megatron.studies.block_metrics import by_block
from sparsecod_megatron.studies.metrics import measured_intervals, measured_metrics
from tests.unit.analysis.scores.families import context, tiny


def test_needed_tokens_by_block(tmp_path: Path) -> None:
    analysis = analyze(context(tiny("llama")), find_scores(["token_skip", "skip"]), settings={})
    write_analysis(analysis, tmp_path)
    rows = [row for row in analysis.results["token_skip"].tables["token_skip"] if row["tokens_of"] == "all"]
    metrics, intervals = measured_metrics(analysis=tmp_path, evaluation=tmp_path), measured_intervals(tmp_path)
    assert by_block(metrics, "token_skip/needs") == [row["needs"] for row in rows] and len(rows) == 3
    assert by_block(metrics, "token_skip/better_without") == [row["better_without"] for row in rows]
    assert intervals["token_skip/better_without/1"] == (rows[1]["better_low"], rows[1]["better_high"])
    assert by_block(metrics, "skip/skip_loss") == [], "no name of its own for blocks of other scores"
