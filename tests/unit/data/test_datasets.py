from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sparsecod_megatron.config.blend import parse_blend
from sparsecod_megatron.data.datasets import build_dataset
from sparsecod_megatron.errors import DataError
from tests.helpers.cli import FORK_SERVER

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


def build(blend, *, cache, num_samples=20, seed=1):
    return build_dataset(
        parse_blend("data.train", blend),
        num_samples=num_samples,
        seq_length=SEQUENCE,
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
    dataset = build(write_tokens(texts), cache=tmp_path / "cache", num_samples=(total - 1) // SEQUENCE)
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
    dataset = build(write_tokens(texts), cache=tmp_path / "cache", num_samples=50)
    got = samples(dataset)
    assert len(got) >= 50
    counts = np.bincount([token for sample in got for token in sample[:-1]])[1:]
    assert counts.min() >= 50 * SEQUENCE // sum(map(len, texts)) - 1


def test_the_seed_decides_the_order(write_tokens, tmp_path):
    prefix = write_tokens(documents(60))
    first, again, other = (
        samples(build(prefix, cache=tmp_path / name, seed=seed)) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize("few", [1, 15, 39, 40, 41, 90])
def test_a_longer_dataset_only_goes_on_where_a_shorter_one_ends(write_tokens, tmp_path, few):
    """So that raising train_steps of a run changes nothing of what it has seen; one epoch is about 20 samples."""
    prefix, other = write_tokens(documents(20)), write_tokens(documents(5), name="other")
    for blend in (prefix, [0.3, prefix, 0.7, other]):
        long = samples(build(blend, cache=tmp_path / "cache", num_samples=200))
        short = samples(build(blend, cache=tmp_path / "cache", num_samples=few))
        assert few <= len(short)
        assert short[:few] == long[:few]


def test_one_epoch_has_the_order_that_megatron_gives_it(write_tokens, tmp_path):
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    prefix = write_tokens(documents(60))
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=SEQUENCE,
        blend=([prefix], None),
        split="1",
        path_to_cache=str(tmp_path / "theirs"),
        tokenizer=SimpleNamespace(eod=0, vocab_size=500, unique_identifiers={}),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    theirs, _, _ = BlendedMegatronDatasetBuilder(GPTDataset, [10, 0, 0], lambda: True, config).build()
    assert samples(build(prefix, cache=tmp_path / "ours", num_samples=10)) == samples(theirs)


@pytest.mark.parametrize(("weights", "share"), [((), 0.75), ((0.2, 0.8), 0.2)])
def test_a_blend_draws_by_tokens_or_by_weight_and_repeats(write_tokens, tmp_path, weights, share):
    prefixes = [write_tokens([[7] * 300], name="a"), write_tokens([[9] * 100], name="b")]
    blend = [part for pair in zip(weights, prefixes, strict=True) for part in pair] if weights else prefixes
    dataset = build(blend, cache=tmp_path / "cache", num_samples=200)
    assert len(dataset) >= 200
    drawn = np.mean([sample[0] == 7 for sample in samples(dataset)])
    assert drawn == pytest.approx(share, abs=0.01)


def test_files_written_again_are_not_read_through_the_old_index(write_tokens, tmp_path):
    cache = tmp_path / "cache"
    build(write_tokens(documents(60)), cache=cache)
    dataset = build(write_tokens(documents(9)), cache=cache)
    fresh = build(write_tokens(documents(9)), cache=tmp_path / "fresh")
    assert samples(dataset) == samples(fresh)


def _build_and_die(prefix: str, cache: Path) -> None:
    save = np.save

    def save_half(path, array, **options):
        save(path, array, **options)
        if "shuffle" in path:
            os.truncate(path, 100)
            os.kill(os.getpid(), signal.SIGKILL)

    np.save = save_half
    build(prefix, cache=cache)


def test_a_killed_build_leaves_a_cache_that_the_next_one_uses(write_tokens, tmp_path):
    prefix, cache = write_tokens(documents(60)), tmp_path / "cache"
    killed = FORK_SERVER.Process(target=_build_and_die, args=(prefix, cache))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert samples(build(prefix, cache=cache)) == samples(build(prefix, cache=tmp_path / "fresh"))


def test_an_index_is_built_once(write_tokens, tmp_path):
    prefix, cache = write_tokens(documents(60)), tmp_path / "cache"
    build(prefix, cache=cache)
    before = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    build(prefix, cache=cache)
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == before
    assert len(before) == 4


def test_unusable_files_and_caches_are_one_line(write_tokens, tmp_path):
    prefix = write_tokens(documents(20))
    with pytest.raises(DataError, match=r"absent\.idx: no such file"):
        build([prefix, str(tmp_path / "absent")], cache=tmp_path)
    with pytest.raises(DataError, match="a share of 1e-09 is less than one sample in 1048576"):
        build([1e-9, prefix, 1, write_tokens(documents(20), name="b")], cache=tmp_path)
    with pytest.raises(DataError, match=r"tokens\.bin: the sample index cannot be written"):
        build(prefix, cache=Path(prefix + ".bin"))
    os.truncate(prefix + ".bin", 100)
    with pytest.raises(DataError, match=r"tokens\.bin: 100 bytes, but its \.idx file says"):
        build(prefix, cache=tmp_path)


def _build_on_rank(rank: int, blends: list, directory: str) -> None:
    torch.distributed.init_process_group("gloo", f"file://{directory}/store", rank=rank, world_size=2)
    built = [samples(build(blend, cache=Path(directory) / "cache")) for blend in blends]
    messages = []
    for blend, cache in ((blends[0] + "-absent", Path(directory) / "cache"), (blends[0], Path(directory) / str(rank))):
        try:
            build(blend, cache=cache)
        except DataError as error:
            messages.append(str(error))
    torch.save((built, messages), f"{directory}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.dist
def test_ranks_get_what_one_process_gets(write_tokens, tmp_path):
    one, two = write_tokens(documents(30), name="a"), write_tokens(documents(9), name="b")
    blends = [one, [0.5, one, 0.5, two]]
    ranks = [FORK_SERVER.Process(target=_build_on_rank, args=(rank, blends, str(tmp_path))) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0]
    alone = [samples(build(blend, cache=tmp_path / "alone")) for blend in blends]
    (first, (missing,)), (second, (missing_too, elsewhere)) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first == second == alone
    assert missing == missing_too, "a mistake that one process finds is told by all"
    assert "a-absent.idx: no such file" in missing
    assert "not there on this node; set data.cache_dir to a directory that all nodes share" in elsewhere
