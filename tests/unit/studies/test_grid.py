"""From a study's file to its cells: every combination, each a complete run, or one line that says what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sparsecod_megatron.data.tokenizer import train_tokenizer
from sparsecod_megatron.errors import ConfigError
from sparsecod_megatron.studies import Study, load_study
from tests.unit.studies.conftest import WriteStudy


def test_every_combination_with_every_seed(small_study: Study, tmp_path: Path) -> None:
    names = [cell.name for cell in small_study.cells]
    assert names[:3] == [f"depth=2,decay=none,seed={seed}" for seed in (1, 2, 3)]
    assert len(set(names)) == len(names) == 2 * 2 * 3
    for cell in small_study.cells:
        labels = dict(cell.labels)
        assert cell.config.model.num_layers == int(labels["depth"])
        assert cell.config.optimizer.weight_decay == {"none": 0, "some": 1}[labels["decay"]]
        assert cell.config.train.seed == cell.seed
        assert cell.config.logging.run_dir == str(tmp_path / "out/cells" / cell.name / "run")
        assert cell.config.train.train_steps == 10


def test_the_grid_wins_over_run_which_wins_over_base(write_study: WriteStudy, tmp_path: Path) -> None:
    path = write_study(run={"model.num_layers": 6, "optimizer": {"lr": 0.5}})
    study = load_study(path, tmp_path / "out", ["run.optimizer.lr=0.25", "seeds=[7]"])
    assert [cell.config.model.num_layers for cell in study.cells] == [2, 2, 4, 4]
    assert {cell.config.optimizer.lr for cell in study.cells} == {0.25}
    assert {cell.seed for cell in study.cells} == {7}


def test_a_study_without_grid_is_its_base(write_study: WriteStudy, tmp_path: Path) -> None:
    study = load_study(write_study(grid=[], seeds=[5]), tmp_path)
    assert [cell.name for cell in study.cells] == ["seed=5"]


TYPED = ("1e3", "0123", "2024_01_01", "no", "12:30")


@pytest.mark.parametrize("typed", TYPED)
@pytest.mark.parametrize("section", ["run:", "grid: [{name: text, cells: {0.1:"])
def test_changes_of_a_run_keep_text_as_it_is_typed(
    section: str, typed: str, write_study: WriteStudy, tmp_path: Path
) -> None:
    changes = f"{{data: {{prefix: {typed}}}, data.cache_dir: {typed}, optimizer.lr: 1e3}}"
    path = write_study(grid=[], seeds=[1])
    closing = "}}]" if section.startswith("grid") else ""
    study = path.read_text(encoding="utf-8").replace("grid: []\n", "")
    path.write_text(f"{study}{section} {changes}{closing}\n", encoding="utf-8")
    (cell,) = load_study(path, tmp_path / "out", [f"run.logging.wandb.project={typed}"]).cells
    found = cell.config.data.prefix, cell.config.data.cache_dir, cell.config.logging.wandb.project
    assert found == (typed, typed, typed)
    assert cell.config.optimizer.lr == 1000, "a number where the key is one"


@pytest.mark.parametrize("typed", [text for text in TYPED if ":" not in text])
@pytest.mark.parametrize("axis", ["key: data.prefix, values: [other, {}]", "values: [other, {}], key: data.prefix"])
def test_values_of_an_axis_keep_text_where_its_key_is_text(
    axis: str, typed: str, write_study: WriteStudy, tmp_path: Path
) -> None:
    path = write_study(grid=[], seeds=[1])
    grid = f"grid: [{{name: text, {axis.format(typed)}}}]"
    path.write_text(path.read_text(encoding="utf-8").replace("grid: []", grid), encoding="utf-8")
    cells = load_study(path, tmp_path / "out", [f"budget.reference.text={typed}"]).cells
    assert [cell.labels for cell in cells] == [(("text", "other"),), (("text", typed),)]
    assert [cell.config.data.prefix for cell in cells] == ["other", typed]


def test_a_score_that_a_mechanism_rules_out_is_refused_before_anything_trains(
    write_study: WriteStudy, tmp_path: Path
) -> None:
    path = write_study(grid=[], seeds=[1], run={"mechanisms.engram": {"layers": [1]}})
    with pytest.raises(ConfigError, match=r"scores.names: jacobian .* mechanisms.engram mixes tokens outside of atten"):
        load_study(path, tmp_path / "out", ["scores.names=[causal,jacobian]"])
    assert load_study(path, tmp_path / "out", ["scores.names=[causal]"]).cells


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("scores.names=[causal]", "scores.names: causal need text, and cell seed=1 trains on data.synthetic"),
        ("scores={names: [answers, token_skip], task: synthetic}", "scores.names: token_skip need text"),
        (
            "scores={names: [answers], task: addition}",
            "scores.task: addition is text, and cell seed=1 trains on data.s",
        ),
        ("evaluation.tasks=[piqa]", "evaluation.tasks: piqa need text"),
        ("run.train.eval_interval=0", "train.eval_interval: 0, but the numbers of cell seed=1"),
        ("run.data.synthetic.task=recal", "cell seed=1: data.synthetic.task: 'recal' is not a task"),
    ],
)
def test_a_synthetic_task_is_refused_what_needs_text(
    change: str, said: str, write_study: WriteStudy, tmp_path: Path
) -> None:
    run = {"data": {"synthetic": {"task": "recall"}}, "train": {"eval_interval": 5}}
    path = write_study(grid=[], seeds=[1], run=run, scores={"names": []})
    assert len(load_study(path, tmp_path / "out").cells) == 1
    asking = ["scores={names: [answers, integrated_gradients], task: synthetic, seq_length: 999}"]
    assert len(load_study(path, tmp_path / "out", asking).cells) == 1, "no text, so its length says nothing"
    with pytest.raises(ConfigError) as refusal:
        load_study(path, tmp_path / "out", [change])
    assert said in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("scores.names=[answrs]", "scores.names answrs: no such score; give some of causal"),
        ("scores.names=[answers]", "scores.names answers: asks for answers; give scores.task addition, hops, synth"),
        ("scores.task=hops", "scores.task hops: no score asks it; leave it out, or add answers or"),
        ("scores={names: [], task: hops}", "scores.task: hops, but scores.names is []"),
        (
            "scores={names: [answers], task: synthetic}",
            "scores.task: synthetic, but cell depth=2,decay=none,seed=1 doe",
        ),
        ("scores={names: [answers], task: absent.jsonl}", "scores.task absent.jsonl: cannot be read as text"),
        ("scores={names: [answers], task: hops, difficulties: [8]}", "scores.difficulties 8: hops has 1 to 7"),
        (
            "scores={names: [answers], task: hops, samples: 2}",
            "scores.samples 2: fewer than the 3 difficulties of hops",
        ),
        ("scores={names: [answers], task: synthetic, difficulties: [1]}", "scores.difficulties 1: only of scores.task"),
    ],
)
def test_a_task_that_cannot_be_asked_is_refused(
    change: str, said: str, write_study: WriteStudy, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as refusal:
        load_study(write_study(), tmp_path / "out", [change])
    assert said in str(refusal.value)


def test_questions_longer_than_a_cells_sequences_are_refused(write_study: WriteStudy, tmp_path: Path) -> None:
    """Where its tokenizer is there already: of bytes here, so that a question has a token for each character."""
    tokenizer = train_tokenizer(["From A to B, steps 2: C. 12+34=46"], 257)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    path = write_study(seeds=[1], run={"data": {"tokenizer": str(tmp_path / "tokenizer"), "seq_length": 64}})
    asking = "scores={names: [answers], task: addition, difficulties: [2]}"
    assert load_study(path, tmp_path / "out", [asking]).cells
    with pytest.raises(
        ConfigError, match=r"scores.task: hops has questions of \d+ tokens, above data.seq_length=64 of c"
    ):
        load_study(path, tmp_path / "out", ["scores={names: [answers], task: hops}"])


AXIS: dict[str, Any] = {"name": "depth", "key": "model.num_layers", "values": [2, 4]}
CLAIM: dict[str, Any] = {"text": "so", "metric": "loss"}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"name": None, "gird": []}, r"study.yaml: unknown key 'gird'; did you mean 'grid'\?"),
        ({"base": "no.yaml"}, r"no.yaml: no such file"),
        ({"seeds": []}, r"seeds: \[\]; give one or more"),
        ({"seeds": [1, 1]}, r"seeds: \[1, 1\]; give one or more, each once"),
        ({"grid": [AXIS, AXIS]}, "two axes have one name"),
        ({"grid": [{"name": "a"}]}, "give either key and values, or cells"),
        ({"grid": [{**AXIS, "cells": {"x": {}}}]}, "give either key and values, or cells"),
        ({"grid": [{**AXIS, "values": []}]}, "no cells"),
        ({"grid": [{**AXIS, "values": [2, 2]}]}, "a value is given twice"),
        ({"grid": [{"name": "a/b", "cells": {"x": {}}}]}, "'a/b' names folders"),
        ({"grid": [{"name": "a", "cells": {"x y": {}}}]}, "'x y' names folders"),
        ({"grid": [{"name": "a", "cells": {"x": 3}}]}, "x: 3 is not a set of changes"),
        ({"grid": [{"name": "a", "cells": {"x": {"model.depth": 3}}}]}, "cell a=x: .*unknown key 'model.depth'"),
        ({"grid": [{**AXIS, "values": [0]}]}, "cell depth=0: model.num_layers: 0 is below 1"),
        ({"grid": [{**AXIS, "key": "model.num_layer"}]}, "did you mean 'model.num_layers'"),
        ({"budget": {"match": "flops"}}, "study.yaml: budget.match: 'flops' is not one of tokens, compute"),
        ({"budget": {"tokens": 10}}, "budget.tokens: 10 are less than half a step of 64"),
        ({"budget": {"reference": {"depth": "3"}}}, r"budget.reference: depth=3 is not in the grid \(depth: 2|4"),
        ({"claims": [CLAIM]}, r"claims\[0\]: give higher and lower, or one of"),
        ({"claims": [{**CLAIM, "higher": {"depth": "2"}}]}, r"claims\[0\]: give higher and lower"),
        ({"claims": [{**CLAIM, "rises_along": "width"}]}, r"claims\[0\]: 'width' is not an axis"),
        (
            {"claims": [{**CLAIM, "higher": {"depth": "2"}, "lower": {"depth": "9"}}]},
            r"claims\[0\].lower: depth=9 is not in the grid",
        ),
        (
            {"scores": {"seq_length": 17}},
            "scores.seq_length: 17 is above data.seq_length=16 of cell depth=2,decay=none",
        ),
        ({"launch": {"slots": 0}}, "launch.slots: 0 is below 1"),
        ({"scores": {"samples": "many"}}, "scores.samples"),
    ],
)
def test_a_mistake_is_one_line(keys: dict[str, Any], message: str, write_study: WriteStudy, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        load_study(write_study(**keys), tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_an_unknown_cell_is_told_the_others(small_study: Study) -> None:
    with pytest.raises(ConfigError, match=r"--cell x: no such cell; choose one of depth=2,decay=none,seed=1"):
        small_study.cell("x")
    assert small_study.cell("depth=4,decay=some,seed=3") is small_study.cells[-1]
