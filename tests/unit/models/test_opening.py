"""Every kind of directory opens in the one way there is, and leaves nothing behind: neither files nor memory."""

from __future__ import annotations

import gc
import importlib.util
import shutil
import tempfile
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparsecod_megatron.compression.compress import compress, write_model
from sparsecod_megatron.compression.registry import find_method
from sparsecod_megatron.errors import CheckpointError, ConfigError, SparsecodError
from sparsecod_megatron.models.opening import Opened, open_model
from tests.helpers.words import save_with_words
from tests.unit.checkpoint.test_stream import write
from tests.unit.compression.models import sequences, tiny

from sparsecod_megatron.checkpoint.exported import export_checkpoint  # isort: skip  (after a backend is selected)

PACKAGE = Path(__file__).parents[3] / "sparsecod_megatron"
modelopt = pytest.mark.skipif(
    importlib.util.find_spec("modelopt") is None, reason="needs nvidia-modelopt (the extra `modelopt`)"
)


@torch.no_grad()
def logits(opened: Opened) -> Tensor:
    return opened.model(torch.arange(8)[None]).logits


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with one step and a tokenizer."""
    folder = tmp_path_factory.mktemp("world")
    words = save_with_words(tiny("llama"), folder / "words")
    (folder / "run" / "tokenizer").mkdir(parents=True)
    for file in words.glob("tokenizer*"):
        shutil.copy(file, folder / "run" / "tokenizer")
    write(folder / "run" / "checkpoints", "model.vocab_size=67")
    return folder / "run"


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where exports of this test go."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_run_step_and_export_are_one_model(run: Path, temporary: Path, tmp_path: Path) -> None:
    exported = tmp_path / "hf"
    export_checkpoint(run, exported)
    found = []
    for path in (run, next((run / "checkpoints").glob("step_*")), exported):
        with open_model(path, verify=path == run) as opened:
            assert bool(list(temporary.iterdir())) == (path != exported)
            assert not opened.model.training and opened.model is opened.model
            assert opened.tokenizer("w3 w5")["input_ids"] == [4, 6]
            found.append(logits(opened))
        assert not list(temporary.iterdir())
        with pytest.raises(AssertionError, match="after it was closed"):
            _ = opened.model
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    with open_model(exported, dtype="bfloat16") as opened:
        assert opened.model.dtype == torch.bfloat16


@modelopt
def test_a_quantised_directory_computes_what_was_measured(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = save_with_words(tiny("llama"), tmp_path / "source")
    with open_model(source) as opened:
        result = compress(opened.model, find_method("int8"), sequences(), batch_size=4)
        with torch.no_grad():
            measured, rounded = (model(torch.arange(8)[None]).logits for model in (result.scored, result.model))
        (tmp_path / "int8").mkdir()
        write_model(result, opened.tokenizer, source, tmp_path / "int8")
    with open_model(tmp_path / "int8") as opened:
        assert torch.allclose(logits(opened), measured, atol=1e-5)
    assert not torch.allclose(measured, rounded, atol=1e-4) and not caplog.records
    with open_model(tmp_path / "int8", restored=False) as opened:
        assert torch.equal(logits(opened), rounded)
    assert "its weights alone, without input_ranges.json" in caplog.text


def test_a_closed_model_leaves_memory_before_the_next_is_loaded(tmp_path: Path) -> None:
    paths = [save_with_words(tiny("llama"), tmp_path / name) for name in "ab"]
    first, second = (open_model(path) for path in paths)
    gone = weakref.ref(first.model)
    first.close()
    first.close()
    assert gone() is None and second.model is not None
    second.close()


def test_what_cannot_be_opened_is_refused_and_leaves_nothing(run: Path, temporary: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    untold = tmp_path / "without tokenizer"
    shutil.copytree(run, untold)
    shutil.rmtree(untold / "tokenizer")
    cases: list[tuple[Path, type[SparsecodError], str]] = [
        (tmp_path / "absent", CheckpointError, "absent: no such folder; give a HuggingFace model directory"),
        (tmp_path / "empty", CheckpointError, "empty: no checkpoint here"),
        (untold, CheckpointError, "no tokenizer that transformers can load"),
    ]
    for path, kind, message in cases:
        with pytest.raises(kind, match=message):
            open_model(path, verify=False)
        assert not list(temporary.iterdir())
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="--device cuda: PyTorch sees no CUDA device"):
            open_model(run, device="cuda")
    with pytest.raises(KeyboardInterrupt), open_model(run, verify=False):
        raise KeyboardInterrupt
    gc.collect()
    assert not list(temporary.iterdir())


def test_there_is_no_other_way_in() -> None:
    """Besides the parity gate, which compares files before anyone may use them."""
    loading = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if "AutoModelForCausalLM.from_pretrained(" in path.read_text(encoding="utf-8")
    }
    assert loading == {"models/loading.py", "hf/parity.py"}
    callers = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if "import load_model" in path.read_text(encoding="utf-8")
    }
    assert callers == {"models/opening.py"}
