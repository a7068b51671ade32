from __future__ import annotations

import functools
import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

from sparsecod_megatron.data.encode import load_encoding_tokenizer
from sparsecod_megatron.data.sources import open_corpus
from sparsecod_megatron.data.tokenizer import (
    END_OF_TEXT,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
    vocabulary_size,
)
from sparsecod_megatron.errors import DataError

TRAINING = ["the cat sat on the mat, the cat sat\n"] * 20 + ["größe 日本語 1234, and another quick brown fox\n"] * 20
UNICODE = st.text(st.characters(codec="utf-8"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("trained")
    save_tokenizer(train_tokenizer(TRAINING, 300), directory)
    return directory


@given(text=UNICODE)
def test_a_trained_tokenizer_loads_with_transformers_and_keeps_any_text(trained, text):
    tokenizer = _auto(trained)
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_a_trained_tokenizer_has_the_size_asked_for_and_ends_documents(trained):
    tokenizer = _auto(trained)
    assert len(tokenizer) == vocabulary_size(tokenizer) == 300
    assert tokenizer.eos_token == END_OF_TEXT
    assert len(tokenizer.encode("the cat sat")) < 6


def test_training_is_deterministic_across_processes(trained):
    program = (
        "import json, sys; from sparsecod_megatron.data.tokenizer import train_tokenizer;"
        "print(train_tokenizer(json.load(sys.stdin), 300).backend_tokenizer.to_str())"
    )
    command = [sys.executable, "-W", "ignore", "-c", program]
    texts = json.dumps(TRAINING)
    again = subprocess.run(command, input=texts, capture_output=True, text=True, check=True).stdout
    assert json.loads(again)["model"] == json.loads((trained / "tokenizer.json").read_text())["model"]


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_saved_tokenizers_load_with_the_same_ids(trained, kind):
    tokenizer = load_tokenizer(str(trained if kind == "directory" else trained / "tokenizer.json"))
    assert tokenizer.encode("the größe 🎉") == _auto(trained).encode("the größe 🎉")
    assert tokenizer.eos_token == END_OF_TEXT


@given(text=UNICODE)
def test_documents_that_quote_special_tokens_stay_text(trained, text):
    quoted = f"{text}{END_OF_TEXT}{text}"
    backend = load_encoding_tokenizer(trained / "tokenizer.json")
    ids = backend.encode(quoted, add_special_tokens=False).ids
    assert _auto(trained).eos_token_id not in ids
    assert backend.decode(ids, skip_special_tokens=False) == quoted


def test_a_vocabulary_with_gaps_needs_rows_up_to_its_largest_id():
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 7}, unk_token="a"))
    from transformers import PreTrainedTokenizerFast

    assert vocabulary_size(PreTrainedTokenizerFast(tokenizer_object=backend)) == 8


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.json", None, "absent.json: no such tokenizer file"),
        ("absent.model", None, "absent.model: no such tokenizer file"),
        ("no-such-directory", None, "no-such-directory: no tokenizer can be made of it"),
        ("bad.json", "{}", "bad.json: no tokenizer can be made of it"),
        ("bad.model", "text", "bad.model: no tokenizer can be made of it"),
    ],
)
def test_what_is_no_tokenizer_is_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        load_tokenizer(str(tmp_path / name))


def test_a_tokenizer_without_end_of_text_is_refused(tmp_path):
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "plain.json"))
    with pytest.raises(DataError, match="no end-of-text token"):
        load_tokenizer(str(tmp_path / "plain.json"))


def test_a_vocabulary_too_small_for_bytes_is_refused():
    with pytest.raises(DataError, match=r"train:256: too small; at least 257 are needed"):
        train_tokenizer(TRAINING, 256)


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize("dummy_prefix", [True, False])
def test_sentencepiece_ids_survive_conversion(tmp_path, model_type, dummy_prefix):
    import sentencepiece

    model = tmp_path / "model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TRAINING),
        model_prefix=str(model),
        vocab_size=330,
        model_type=model_type,
        byte_fallback=True,
        add_dummy_prefix=dummy_prefix,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    _check_sentencepiece(
        model.with_suffix(".model"), tmp_path / "saved", [*TRAINING[::20], "  two  spaces ", "🎉\n\tx", ""]
    )


def test_sentencepiece_ids_survive_conversion_of_a_real_model(shared_data, tmp_path):
    texts = list(open_corpus(str(shared_data / "text" / "wikitext2_test.txt"), max_documents=12))
    texts += list(open_corpus("stdlib", max_documents=25))
    model = shared_data / "tokenizers" / "axlearn_bpe_32k_c4.model"
    tokenizer = _check_sentencepiece(model, tmp_path, [*texts, " lead", "a\n\n\n\n        b"])
    assert len(tokenizer) == 32_000


def test_the_papers_tokenizer_loads_and_keeps_text(shared_data, tmp_path):
    tokenizer = load_tokenizer(str(shared_data / "tokenizers" / "gpt-neox-olmo.json"))
    save_tokenizer(tokenizer, tmp_path)
    assert (vocabulary_size(tokenizer), tokenizer.eos_token_id) == (50_280, 50_279)
    text = "def f(x):\n        return 'naïve 日本 🎉'\n"
    assert _auto(tmp_path).decode(_auto(tmp_path).encode(text)) == text


def _check_sentencepiece(model, directory, texts):
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(model))
    save_tokenizer(load_tokenizer(str(model)), directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    backend = load_encoding_tokenizer(directory / "tokenizer.json")
    for text in texts:
        ids = backend.encode(text, add_special_tokens=False).ids
        assert ids == processor.encode(text)
        assert tokenizer.decode(ids) == text
        if "<unk>" not in text:  # WikiText quotes it, and transformers would read it as the special token
            assert tokenizer.encode(text, add_special_tokens=False) == ids
    assert tokenizer.eos_token_id == processor.eos_id()
    return tokenizer


@functools.cache
def _auto(directory):
    """Hypothesis runs a test a hundred times; the tokenizer is loaded once."""
    return AutoTokenizer.from_pretrained(directory)
