"""Token files of another tokenizer are refused by what the tokenizers do, not by their names."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sparsecod_megatron.config import load_config
from sparsecod_megatron.data.metadata import read_info, write_info
from sparsecod_megatron.data.options import PreprocessOptions
from sparsecod_megatron.data.preprocess import preprocess
from sparsecod_megatron.data.tokenizer_identity import check_made_with, tokenizer_digest
from sparsecod_megatron.errors import DataError
from sparsecod_megatron.train.data import prepare_data
from tests.helpers.text import write_corpus


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two data sets of as many entries, whose tokenizers learnt other merges."""
    folder = tmp_path_factory.mktemp("identity")
    write_corpus(folder / "texts", documents=4, seed=0)
    (folder / "other.txt").write_text("zyx wvu tsr " * 400 + "\n\nqpo nml kji " * 4000)
    for name, source in (("a", "texts"), ("b", "other.txt")):
        preprocess(PreprocessOptions(str(folder / source), "train:300", folder / name, val_fraction=0.3))
    return folder


def refusal(world: Path, train: object, validation: str, tokenizer: str = "a_tokenizer") -> None:
    overrides = [
        "model.num_layers=1",
        "model.hidden_size=16",
        "model.num_attention_heads=2",
        "model.ffn_hidden_size=16",
        "precision.dtype=fp32",
        f"data.train={json.dumps(train)}",
        f"data.validation={json.dumps(validation)}",
        f"data.tokenizer={world / tokenizer}",
        "data.seq_length=16",
        "train.train_steps=2",
        "train.global_batch_size=4",
        "train.eval_interval=1",
        "train.eval_steps=1",
    ]
    (world / "run.yaml").write_text("{}")
    prepare_data(load_config(world / "run.yaml", overrides))


def test_every_source_of_a_run_is_of_its_tokenizer(world: Path) -> None:
    """All are named alike and hold ids below the vocabulary."""
    a, b, b_val = (str(world / name) for name in ("a_train", "b_train", "b_val"))
    refusal(world, a, str(world / "a_val"))
    blend = [0.9, a, 0.1, b]
    for train, validation, wrong in ((b, b_val, b), (blend, str(world / "a_val"), b), (a, b_val, b_val)):
        with pytest.raises(
            DataError, match=rf"{wrong}: made with another tokenizer than data.tokenizer .* is \d+ there"
        ):
            refusal(world, train, validation)


def test_another_name_of_the_same_content_is_the_same(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "a_tokenizer", tmp_path / "renamed")
    content = json.loads((world / "a_tokenizer" / "tokenizer.json").read_text())
    (tmp_path / "renamed" / "tokenizer.json").write_text(json.dumps(content))
    refusal(world, str(world / "a_train"), str(world / "a_val"), str(tmp_path / "renamed"))
    refusal(world, str(world / "a_train"), str(world / "a_val"), str(world / "a_tokenizer" / "tokenizer.json"))


def test_the_same_entries_that_split_text_otherwise_are_another(world: Path) -> None:
    own = AutoTokenizer.from_pretrained(world / "a_tokenizer")
    backend = Tokenizer.from_file(str(world / "a_tokenizer" / "tokenizer.json"))
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=True)])
    other = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=own.eos_token)
    assert other.get_vocab() == own.get_vocab()
    assert tokenizer_digest(other) != tokenizer_digest(own)
    with pytest.raises(DataError, match="the same entries, but text is split in another way"):
        check_made_with(world / "a_train", other, owner="x")
    own.add_tokens(["<|more|>"])
    assert check_made_with(world / "a_train", own, owner="x") is None, "more entries change no id"


def test_metadata_of_earlier_versions(world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without a digest the tokenizer beside them tells; without either, and without metadata, a line says so."""
    for path in world.glob("b*"):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    write_info(dataclasses.replace(read_info(world / "b"), tokenizer_digest=None), tmp_path / "b.json")
    train, validation = str(tmp_path / "b_train"), str(tmp_path / "b_val")
    with pytest.raises(DataError, match="made with another tokenizer"):
        refusal(world, train, validation)
    refusal(world, train, validation, "b_tokenizer")
    assert not caplog.messages
    shutil.rmtree(tmp_path / "b_tokenizer")
    refusal(world, train, validation, "b_tokenizer")
    assert len(caplog.messages) == 2 and "metadata of an earlier version and no" in caplog.messages[0]
    (tmp_path / "b.json").unlink()
    refusal(world, train, validation)
    assert "b_train: no `sparsecod data` metadata beside it, so nothing checks" in caplog.messages[2]


def test_a_digest_is_enough(world: Path, tmp_path: Path) -> None:
    for name in ("a.json", "a_train.bin", "a_train.idx"):
        shutil.copy(world / name, tmp_path / name)
    a, b = (AutoTokenizer.from_pretrained(world / f"{name}_tokenizer") for name in "ab")
    assert check_made_with(tmp_path / "a_train", a, owner="x") is None
    for _ in range(2):
        with pytest.raises(DataError, match="another tokenizer than x: their entries or splits differ"):
            check_made_with(tmp_path / "a_train", b, owner="x")
        shutil.copytree(world / "b_tokenizer", tmp_path / "a_tokenizer", dirs_exist_ok=True)  # no witness any more


def test_documents_end_as_the_tokenizer_says(world: Path, tmp_path: Path) -> None:
    # The entry of byte 0, which no text holds as this character: a special token is split off wherever it stands.
    AutoTokenizer.from_pretrained(world / "a_tokenizer", eos_token="Ā").save_pretrained(tmp_path / "other_end")
    with pytest.raises(DataError, match=r"a_train: documents end with id 0, but the end-of-text token"):
        refusal(world, str(world / "a_train"), str(world / "a_val"), str(tmp_path / "other_end"))
