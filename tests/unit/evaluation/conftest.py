"""A tiny Llama with a tokenizer trained on the standard library's own text, and the same text as a Megatron dataset."""

from __future__ import annotations

import argparse
import inspect
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

VOCAB_SIZE = 300
END = "<|end|>"


def llama(vocab_size: int = VOCAB_SIZE, **changes: int) -> LlamaForCausalLM:
    """A Llama of two layers with random weights large enough that its predictions differ from token to token."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=vocab_size,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
        **(sizes | changes),
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def text() -> str:
    """About 100 kB of English and code, with characters of several bytes."""
    return inspect.getsource(argparse) + "Ünïcödé – ελληνικά 漢字\n" * 3 + inspect.getsource(textwrap)


@pytest.fixture(scope="session")
def tokenizer(text: str) -> PreTrainedTokenizerBase:
    """Byte-level BPE, so that decoding gives the text back exactly."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        [text],
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END)


@pytest.fixture(scope="session")
def make_llama() -> Callable[..., LlamaForCausalLM]:
    return llama


@pytest.fixture(scope="session")
def model() -> LlamaForCausalLM:
    return llama()


@pytest.fixture
def model_dir(tmp_path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> Path:
    directory = tmp_path / "model"
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def write_dataset(tmp_path: Path) -> Callable[[Sequence[Sequence[int]]], Path]:
    """A function that writes documents of token ids with Megatron's own builder and returns the prefix."""

    def write(documents: Sequence[Sequence[int]]) -> Path:
        import numpy as np
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        prefix = tmp_path / "held_out"
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
        for document in documents:
            builder.add_document(torch.tensor(document), [len(document)])
        builder.finalize(f"{prefix}.idx")
        return prefix

    return write
