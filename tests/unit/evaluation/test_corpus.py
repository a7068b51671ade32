"""Held-out sources: Megatron datasets and text files give the same stream, and damaged ones a clear refusal."""

from __future__ import annotations

import gzip
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sparsecod_megatron.data.options import PreprocessOptions
from sparsecod_megatron.data.preprocess import preprocess
from sparsecod_megatron.errors import DataError
from sparsecod_megatron.evaluation.corpus import dataset_prefix, read_corpus, read_documents

WriteDataset = Callable[[Sequence[Sequence[int]]], Path]


@pytest.fixture
def documents(text: str) -> list[str]:
    third = len(text) // 3
    return [text[:third], text[third : 2 * third], text[2 * third :]]


@pytest.fixture
def dataset(documents: list[str], tokenizer: PreTrainedTokenizerBase, write_dataset: WriteDataset) -> Path:
    return write_dataset([[*tokenizer(document)["input_ids"], tokenizer.eos_token_id] for document in documents])


def words_tokenizer(*, bos: bool) -> PreTrainedTokenizerBase:
    words = Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "bb": 2, "ccc": 3}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=words, **({"bos_token": "<s>"} if bos else {}))


def test_dataset_is_its_documents_in_a_row(
    dataset: Path, text: str, documents: list[str], tokenizer: PreTrainedTokenizerBase
) -> None:
    corpus = read_corpus(dataset, tokenizer)
    end = tokenizer.eos_token_id
    expected = [end]
    for document in documents:
        expected += [*tokenizer(document)["input_ids"], end]
    assert corpus.tokens.tolist() == expected
    assert corpus.num_bytes == len(text.encode())
    assert list(read_documents(dataset, tokenizer)) == documents


def test_text_file_is_its_tokens(tmp_path: Path, text: str, tokenizer: PreTrainedTokenizerBase) -> None:
    source = tmp_path / "held_out.txt"
    source.write_text(text, encoding="utf-8")
    corpus = read_corpus(source, tokenizer)
    assert tokenizer.decode(corpus.tokens[1:].tolist()) == text
    assert corpus.num_bytes == len(text.encode())
    assert list(read_documents(source, tokenizer)) == [text]


@pytest.mark.parametrize("max_tokens", [1, 1000, 25_000, 10**9])
def test_max_tokens_keeps_the_beginning(
    tmp_path: Path, dataset: Path, text: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> None:
    source = tmp_path / "held_out.txt"
    source.write_text(text, encoding="utf-8")
    for path in (dataset, source):
        whole, part = read_corpus(path, tokenizer), read_corpus(path, tokenizer, max_tokens=max_tokens)
        assert part.tokens.tolist() == whole.tokens.tolist()[: max_tokens + 1]
        decoded = tokenizer.decode(part.tokens[1:].tolist(), skip_special_tokens=True)
        assert part.num_bytes == pytest.approx(len(decoded.encode()), abs=4)  # a cut character may decode differently


def test_stream_opens_with_what_the_tokenizer_puts_before_text(tmp_path: Path) -> None:
    source = tmp_path / "held_out.txt"
    source.write_text("a bb ccc", encoding="utf-8")
    assert read_corpus(source, words_tokenizer(bos=True)).tokens.tolist() == [0, 1, 2, 3]
    without = read_corpus(source, words_tokenizer(bos=False))
    assert without.tokens.tolist() == [1, 2, 3]
    assert without.num_bytes == len(" bb ccc")
    assert read_corpus(source, words_tokenizer(bos=False), max_tokens=1).tokens.tolist() == [1, 2]


def test_suffixes_may_be_written_out(dataset: Path) -> None:
    assert (
        dataset_prefix(Path(f"{dataset}.bin"))
        == dataset_prefix(Path(f"{dataset}.idx"))
        == dataset_prefix(dataset)
        == dataset
    )


def test_missing_source(tmp_path: Path, dataset: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match="no such text file, and no dataset"):
        read_corpus(tmp_path / "absent", tokenizer)
    Path(f"{dataset}.bin").unlink()
    with pytest.raises(DataError, match=r"held_out\.bin is missing"):
        read_corpus(dataset, tokenizer)


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A data set of `sparsecod data`: PREFIX with its own tokenizer and PREFIX_val."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(4):
        lines = (f"Line {line} of text {number} says ünï <|endoftext|> {line * number}." for line in range(50))
        (folder / f"{number}.txt").write_text("\n".join(lines), encoding="utf-8")
    prefix = tmp_path / "prepared"
    preprocess(PreprocessOptions(input=str(folder), tokenizer="train:280", output=prefix, val_fraction=0.5))
    return prefix


def test_reads_what_the_data_command_writes(prepared: Path) -> None:
    own = AutoTokenizer.from_pretrained(f"{prepared}_tokenizer")
    held_out = Path(f"{prepared}_val")
    corpus, documents = read_corpus(held_out, own), list(read_documents(held_out, own))
    texts = [path.read_text(encoding="utf-8") for path in sorted((prepared.parent / "texts").iterdir())]
    assert len(documents) == 2 and set(documents) < set(texts)
    assert corpus.num_bytes == len("".join(documents).encode())
    one_file = prepared.parent / "one.txt"
    one_file.write_text(documents[0], encoding="utf-8")
    stream = read_corpus(one_file, own).tokens.tolist()
    assert corpus.tokens.tolist()[: len(stream)] == stream
    assert corpus.tokens.tolist().count(own.eos_token_id) == 3


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_file_is_the_tokens_that_data_makes_of_it(tmp_path: Path, encoding: str) -> None:
    """Line ends of Windows and byte-order marks, packed or not."""
    source = tmp_path / "text.txt.gz"
    source.write_bytes(gzip.compress("Größe\r\nnext line\r\n\r\nthird".encode(encoding)))
    preprocess(PreprocessOptions(str(source), "train:280", tmp_path / "out"))
    own = AutoTokenizer.from_pretrained(f"{tmp_path}/out_tokenizer")
    stream, made = read_corpus(source, own), read_corpus(tmp_path / "out_train", own)
    assert own.decode(stream.tokens[1:].tolist()) == "Größe\r\nnext line\r\n\r\nthird"
    assert stream.tokens.tolist() == made.tokens.tolist()[:-1]
    assert stream.num_bytes == made.num_bytes


@pytest.mark.parametrize("name", ["a.json", "a.JSONL", "a", "a.parquet"])
def test_documents_are_no_text(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    (tmp_path / name).write_text('{"text": "alpha beta"}\n')
    for read in (read_corpus, lambda *arguments: next(read_documents(*arguments))):
        with pytest.raises(DataError, match="holds documents, not one text; run `sparsecod data"):
            read(tmp_path / name, tokenizer)


def test_token_files_are_read_without_megatron(prepared: Path) -> None:
    """Its import takes seconds, of an analysis that takes a few."""
    program = (
        "import sys; from pathlib import Path; from transformers import AutoTokenizer;"
        "from sparsecod_megatron.evaluation.corpus import read_corpus;"
        f"read_corpus(Path({f'{prepared}_val'!r}), AutoTokenizer.from_pretrained({f'{prepared}_tokenizer'!r}));"
        "sys.exit('megatron' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_dataset_of_another_tokenizer(prepared: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    for read in (read_corpus, lambda *arguments: next(read_documents(*arguments))):
        with pytest.raises(
            DataError, match=r"prepared_val: made with another tokenizer than the model's: '<\|endoftext"
        ):
            read(Path(f"{prepared}_val"), tokenizer)


@pytest.mark.parametrize(("suffix", "keep"), [(".bin", -2), (".bin", 0), (".idx", 0), (".idx", 20), (".idx", -5)])
def test_truncated_dataset(dataset: Path, tokenizer: PreTrainedTokenizerBase, suffix: str, keep: int) -> None:
    path = Path(f"{dataset}{suffix}")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match="sparsecod data"):
        read_corpus(dataset, tokenizer)


def test_foreign_index(dataset: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    Path(f"{dataset}.idx").write_bytes(b"not an index of any kind" * 10)
    with pytest.raises(DataError, match="not a Megatron index file"):
        read_corpus(dataset, tokenizer)


def test_text_that_is_none(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    source = tmp_path / "held_out.txt"
    source.write_bytes(b"")
    with pytest.raises(DataError, match="no text to score"):
        read_corpus(source, tokenizer)
    source.write_bytes(b"abc\xff")
    with pytest.raises(DataError, match=r"not UTF-8 text \(byte 0xff\)"):
        read_corpus(source, tokenizer)
