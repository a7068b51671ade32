"""Damaged tokenizer files of every kind: a tokenizer that encodes, or one DataError line; never a traceback."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sparsecod_megatron.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer, vocabulary_size
from sparsecod_megatron.errors import DataError
from tests.helpers.json_damage import VALUES, places, replaced

TEXTS = ["the cat sat on the mat\n", "größe 日本語 1234, and another quick brown fox\n"] * 30


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One good tokenizer of each kind."""
    folder = tmp_path_factory.mktemp("tokenizers")
    save_tokenizer(train_tokenizer(TEXTS, 300), folder / "huggingface")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=60, model_type="bpe", minloglevel=2
    )
    (folder / "spm.model").write_bytes(model.getvalue())
    ranks = [f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256)]
    (folder / "ranks.tiktoken").write_text("".join(ranks))
    return {
        "json": folder / "huggingface" / "tokenizer.json",
        "model": folder / "spm.model",
        "tiktoken": folder / "ranks.tiktoken",
    }


def use_or_refuse(path: Path) -> None:
    """Load; what loads must encode."""
    try:
        tokenizer = load_tokenizer(str(path))
    except DataError as error:
        assert str(error).count("\n") == 0 and str(path) in str(error)
        return
    tokenizer.encode("the cat größe")
    assert vocabulary_size(tokenizer) > 0


@pytest.mark.parametrize("kind", ["json", "model", "tiktoken"])
@settings(max_examples=60)
@given(place=st.integers(0, 10**6), damage=st.binary(max_size=6), cut=st.sampled_from([0, 1, 3, 10**6]))
@example(place=108, damage=b"\x01", cut=1)  # a piece that protobuf gives as bytes
def test_any_bytes(
    files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, kind: str, place: int, damage: bytes, cut: int
) -> None:
    """Bytes replaced, inserted and cut off."""
    content = files[kind].read_bytes()
    position = place % (len(content) + 1)
    path = tmp_path_factory.getbasetemp() / f"damaged.{kind}"
    path.write_bytes(content[:position] + damage + content[position + cut :])
    use_or_refuse(path)


@settings(max_examples=60)
@given(
    pick=st.integers(0, 10**6), value=VALUES, mend=st.sampled_from([lambda value: value, str, lambda value: [value]])
)
@example(pick=0, value=[], mend=str)
def test_any_value_in_a_tokenizer_json(
    files: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    pick: int,
    value: Any,
    mend: Callable[[Any], Any],
) -> None:
    """A file that is JSON and no tokenizer."""
    content = json.loads(files["json"].read_text())
    candidates = [place for place in places(content) if place[:2] != ("model", "vocab") or len(place) < 4]
    path = tmp_path_factory.getbasetemp() / "strange.json"
    path.write_text(json.dumps(replaced(content, candidates[pick % len(candidates)], mend(value))))
    use_or_refuse(path)


def test_a_panic_of_the_library_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    """Rust's panics are no `Exception`."""
    content = json.loads(files["json"].read_text())
    content["model"]["continuing_subword_prefix"] = "longer than what it is cut from"
    (tmp_path / "panics.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="panics.json: no tokenizer can be made of it"):
        load_tokenizer(str(tmp_path / "panics.json"))
