from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.multiprocessing

from sparsecod_megatron.data.datasets import build_datasets
from sparsecod_megatron.errors import DataError

SEQUENCE = 16


class Tokenizer(SimpleNamespace):
    """The two facts that datasets need of a tokenizer."""

    eos_token_id = 0

    def __len__(self):
        return 500


def documents(count: int, first: int = 1) -> list[list[int]]:
    """Documents of counting tokens, so that a token tells its document and place."""
    lengths = np.random.default_rng(count).integers(5, 30, count)
    starts = first + np.concatenate([[0], np.cumsum(lengths)[:-1]])
    return [[*range(start, start + length), 0] for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)]


def build(train, val=None, *, cache, train_samples=20, val_samples=8, seed=1):
    return build_datasets(
        train_prefix=train,
        val_prefix=val,
        seq_length=SEQUENCE,
        train_samples=train_samples,
        val_samples=val_samples,
        seed=seed,
        tokenizer=Tokenizer(),
        cache_dir=cache,
    )


def samples(dataset) -> list[list[int]]:
    """Each sample with the label that follows its last token."""
    items = [dataset[number] for number in range(len(dataset))]
    for item in items:
        assert item["tokens"][1:].tolist() == item["labels"][:-1].tolist()
        assert item["position_ids"].tolist() == list(range(SEQUENCE))
        assert item["loss_mask"].tolist() == [1.0] * SEQUENCE
        assert "attention_mask" not in item
    return [[*item["tokens"].tolist(), item["labels"][-1].item()] for item in items]


def test_one_epoch_visits_each_token_once_in_document_order(write_tokens, tmp_path):
    texts = documents(60)
    total = sum(map(len, texts))
    dataset, _ = build(write_tokens(texts), cache=tmp_path / "cache", train_samples=(total - 1) // SEQUENCE)
    seen = [token for sample in samples(dataset) for token in sample[:-1] if token]
    assert len(dataset) == (total - 1) // SEQUENCE
    assert len(seen) == len(set(seen))
    every = {token for text in texts for token in text if token}
    assert len(every - set(seen)) <= 2 * SEQUENCE, "only the tail that fills no sample is left out"
    follows = {left: right for text in texts for left, right in zip(text, text[1:], strict=False)}
    for sample in samples(dataset):
        assert all(follows[left] == right for left, right in zip(sample, sample[1:], strict=False) if left)


def test_a_short_corpus_is_repeated(write_tokens, tmp_path):
    texts = documents(3)
    dataset, _ = build(write_tokens(texts), cache=tmp_path / "cache", train_samples=50)
    got = samples(dataset)
    assert len(got) >= 50
    counts = np.bincount([token for sample in got for token in sample[:-1]])[1:]
    assert counts.min() >= 50 * SEQUENCE // sum(map(len, texts)) - 1


def test_the_seed_decides_the_order(write_tokens, tmp_path):
    prefix = write_tokens(documents(60))
    first, again, other = (
        samples(build(prefix, cache=tmp_path / name, seed=seed)[0]) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first == again
    assert first != other


def test_validation_is_its_own_files_or_nothing(write_tokens, tmp_path):
    train, val = write_tokens(documents(20), name="a"), write_tokens(documents(20, first=1000), name="b")
    left, right = build(train, val, cache=tmp_path / "cache")
    assert max(max(sample) for sample in samples(left)) < 1000
    assert min(token for sample in samples(right) for token in sample if token) >= 1000
    assert len(right) >= 8
    assert build(train, None, cache=tmp_path / "cache")[1] is None
    assert build(train, val, cache=tmp_path / "cache", val_samples=0)[1] is None


@pytest.mark.parametrize(("weights", "share"), [((), 0.75), (("0.2", "0.8"), 0.2)])
def test_a_blend_draws_by_tokens_or_by_weight_and_repeats(write_tokens, tmp_path, weights, share):
    prefixes = [write_tokens([[7] * 300], name="a"), write_tokens([[9] * 100], name="b")]
    blend = [part for pair in zip(weights, prefixes, strict=True) for part in pair] if weights else prefixes
    dataset, _ = build(blend, cache=tmp_path / "cache", train_samples=200)
    assert len(dataset) >= 200
    drawn = np.mean([sample[0] == 7 for sample in samples(dataset)])
    assert drawn == pytest.approx(share, abs=0.01)


def test_files_written_again_are_not_read_through_the_old_index(write_tokens, tmp_path):
    cache = tmp_path / "cache"
    build(write_tokens(documents(60)), cache=cache)
    dataset, _ = build(write_tokens(documents(9)), cache=cache)
    fresh, _ = build(write_tokens(documents(9)), cache=tmp_path / "fresh")
    assert samples(dataset) == samples(fresh)


def test_the_index_is_kept_beside_the_files_by_default(write_tokens, tmp_path):
    build(write_tokens(documents(20)), cache=None)
    assert list((tmp_path / "index_cache").glob("*GPTDataset-train-sample_index.npy"))


def test_unusable_files_and_caches_are_one_line(write_tokens, tmp_path):
    prefix = write_tokens(documents(20))
    with pytest.raises(DataError, match=r"absent\.idx: no such file"):
        build([prefix, str(tmp_path / "absent"), prefix], cache=tmp_path)
    with pytest.raises(DataError, match="weight 0.0; every weight must be above 0"):
        build(["0", prefix, "1", prefix], cache=tmp_path)
    with pytest.raises(DataError, match=r"tokens\.bin: cannot be written"):
        build(prefix, cache=Path(prefix + ".bin"))
    os.truncate(prefix + ".bin", 100)
    with pytest.raises(DataError, match=r"tokens\.bin: 100 bytes, but its \.idx file says"):
        build(prefix, cache=tmp_path)


def _build_on_rank(rank: int, blends: list, directory: str) -> None:
    torch.distributed.init_process_group("gloo", f"file://{directory}/store", rank=rank, world_size=2)
    built = [samples(build(blend, blend, cache=Path(directory) / "cache")[part]) for blend in blends for part in (0, 1)]
    torch.save(built, f"{directory}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.dist
def test_ranks_get_what_one_process_gets(write_tokens, tmp_path):
    one, two = write_tokens(documents(30), name="a"), write_tokens(documents(9), name="b")
    blends = [one, ["0.5", one, "0.5", two]]
    torch.multiprocessing.spawn(_build_on_rank, (blends, str(tmp_path)), nprocs=2)
    alone = [samples(build(blend, blend, cache=tmp_path / "alone")[part]) for blend in blends for part in (0, 1)]
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt") == alone
