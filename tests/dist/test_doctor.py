"""`sparsecod doctor` passes a run that is whole, and names what is not; what it repairs trains on."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sparsecod_megatron.checkpoint.manifest import write_manifest
from tests.dist.conftest import Bench
from tests.dist.layouts import BUCKETS
from tests.dist.test_checkpoint_faults import damage, snapshot
from tests.dist.test_layouts import series
from tests.helpers.cli import read_jsonl, sparsecod

pytestmark = pytest.mark.dist
SETTINGS = (
    *("model.num_layers=2", "model.hidden_size=72", "model.ffn_hidden_size=120", "train.train_steps=6"),
    *("checkpoint.save_interval=3", "precision.dtype=bf16", "schedule.lr_warmup_steps=0", *BUCKETS),
)
SUBJECTS = ("files", "fp32 weights", "moments", "data", "versions", "rehearsal")


@pytest.fixture(scope="module")
def whole(bench: Bench) -> Path:
    """Six steps on two processes, saved at the third and the sixth."""
    return bench.train("healthy", *SETTINGS, nproc=2)


def verdicts(output: str) -> dict[str, str]:
    """The second column of the table by the first."""
    rows = [line.split("  ") for line in output.splitlines()[1:]]
    return {words[1]: next(word.strip() for word in words[2:] if word) for words in rows}


@pytest.mark.parametrize(("nproc", "words"), [((), "bit for bit"), (("--nproc", "1"), "closely as recorded")])
def test_a_whole_run_passes(nproc: tuple[str, ...], words: str, whole: Path) -> None:
    """In the layout of the run, by itself, and in one process; the run is left as it is."""
    before = snapshot(whole)
    output = sparsecod("doctor", whole, *nproc).stdout
    assert verdicts(output) == dict.fromkeys(SUBJECTS, "ok")
    assert words in output and "from step_00000003" in output and str(whole / "checkpoints/step_00000006") in output
    assert snapshot(whole) == before


def edit(path: Path, change: Callable[[str], str]) -> None:
    path.write_text(change(path.read_text()))


def exchange_moments(step: Path) -> None:
    """The digests of two layers: as if each had the other's moments."""
    state = json.loads((step / "state.json").read_text())
    one, other = (state["digests"][f"decoder.layers.{layer}.mlp.linear_fc2.weight"] for layer in "01")
    one["exp_avg"], other["exp_avg"] = other["exp_avg"], one["exp_avg"]
    (step / "state.json").write_text(json.dumps(state))
    write_manifest(step, {})


def exchange_masters(step: Path) -> None:
    """Two layers' fp32 weights, in a checkpoint of the format before digests."""
    metadata = pickle.loads((step / ".metadata").read_bytes())
    key = "optimizer.state.param.decoder.layers.mlp.linear_fc2.weight"
    one, other = (stored for index, stored in metadata.storage_data.items() if index.fqn == key)
    assert one.length == other.length
    contents = {}
    for stored in (one, other):
        with (step / stored.relative_path).open("rb") as file:
            file.seek(stored.offset)
            contents[stored.offset, stored.relative_path] = file.read(stored.length)
    for stored, content in zip((other, one), contents.values(), strict=True):
        with (step / stored.relative_path).open("r+b") as file:
            file.seek(stored.offset)
            file.write(content)
    state = json.loads((step / "state.json").read_text())
    (step / "state.json").write_text(json.dumps(state | {"format": 2, "digests": {}}))
    write_manifest(step, {})


FAULTS: dict[str, tuple[Callable[[Path], None], tuple[str, ...], str]] = {
    "files": (lambda run: damage(run / "checkpoints/step_00000006"), (), "is not what was written"),
    "fp32 weights": (
        lambda run: exchange_masters(run / "checkpoints/step_00000006"),
        (),
        "2 of 15 are not the model's: decoder.layers.0.mlp.linear_fc2.weight",
    ),
    "moments": (
        lambda run: exchange_moments(run / "checkpoints/step_00000006"),
        (),
        "exp_avg of decoder.layers.0.mlp.linear_fc2.weight is not what the ranks stepped",
    ),
    "data": (lambda run: None, ("train.seed=9",), "changed since the checkpoint (train.seed: 1234 there, 9 here)"),
    "versions": (
        lambda run: edit(run / "versions.jsonl", lambda text: text.replace('"torch": "', '"torch": "0.')),
        (),
        "torch was 0.",
    ),
}


@pytest.mark.parametrize("subject", FAULTS)
def test_what_differs_is_named(subject: str, whole: Path, tmp_path: Path) -> None:
    """The first in the last line, with exit status 1."""
    plant, arguments, words = FAULTS[subject]
    shutil.copytree(whole, tmp_path / "run")
    plant(tmp_path / "run")
    result = sparsecod("doctor", tmp_path / "run", "--no-rehearsal", *arguments, check=False)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    wrong = [name for name, verdict in verdicts(result.stdout).items() if verdict == "DIFFERS"]
    # A bit of the file is a bit of some tensor too.
    assert wrong == [subject] or subject == wrong[0] == "files"
    last = result.stderr.splitlines()[-1]
    assert f"{len(wrong)} of 5 differ, the first: {subject}: " in last and words in last


def test_steps_that_were_others_are_noticed(whole: Path, tmp_path: Path) -> None:
    """The last bit of a loss."""
    shutil.copytree(whole, tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    records = read_jsonl(path)
    records[4]["loss"] = float(np.nextafter(records[4]["loss"], 9))
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    result = sparsecod("doctor", tmp_path / "run", check=False)
    assert result.returncode == 1
    assert "1 of 6 differ, the first: rehearsal: loss of step 5 was" in result.stderr.splitlines()[-1]


def test_repaired_it_trains_on(whole: Path, bench: Bench, tmp_path: Path) -> None:
    """Refused by train with the command to give; the new run's weights are the old model's, its moments none."""
    run, new = tmp_path / "run", tmp_path / "new"
    shutil.copytree(whole, run)
    exchange_masters(run / "checkpoints/step_00000006")
    further = ("train.train_steps=8", *SETTINGS[:3], *SETTINGS[4:])
    refused = sparsecod("train", bench.config, f"logging.run_dir={run}", *further, check=False)
    assert refused.returncode == 2
    assert re.search(
        r"fp32 weights of decoder.layers.\d.mlp.linear_fc2.weight are not the model's; `spa", refused.stderr
    )
    sparsecod("doctor", run, "--repair", new)
    output = sparsecod("doctor", new, "--no-rehearsal").stdout
    assert verdicts(output) == dict.fromkeys(SUBJECTS[:-1], "ok")
    sparsecod("train", new / "config.yaml", "train.train_steps=8", *BUCKETS)
    assert series(new, "step").tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    np.testing.assert_array_equal(series(new, "loss")[:6], series(whole, "loss"))
    state = json.loads((new / "checkpoints/step_00000008/state.json").read_text())["train"]
    assert state["optimizer_steps"] == 2 and state["step"] == 8
    straight = bench.directory / "healthy-8"
    shutil.copytree(whole, straight)
    bench.train(straight.name, *further)
    np.testing.assert_allclose(series(new, "loss")[6], series(straight, "loss")[6], rtol=3e-3)
    assert series(new, "loss")[7] < series(new, "loss")[0]
