"""A model directory that `AutoModelForCausalLM` and `AutoTokenizer` load, written whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig

from sparsecod_megatron.config import ModelConfig
from sparsecod_megatron.files import making_output
from sparsecod_megatron.hf.extensions import copy_extensions
from sparsecod_megatron.hf.families import choose_family, exported_modules
from sparsecod_megatron.hf.shards import plan_shards, write_shards
from sparsecod_megatron.hf.tokenizer import check_tokenizer, load_tokenizer, special_token_ids
from sparsecod_megatron.seams.mechanism import Mechanism

DEFAULT_SHARD_BYTES = 5 * 10**9


def export_model(
    model: ModelConfig,
    tensors: Mapping[str, Tensor],
    output: Path,
    *,
    mechanisms: Sequence[Mechanism] = (),
    seq_length: int,
    dtype: torch.dtype,
    tokenizer_dir: Path | None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    check: Callable[[Path], None] | None = None,
) -> Path:
    """Write a model as a HuggingFace directory. Local: one process calls it, with unsharded tensors.

    The same arguments give byte-identical files. Tensors are looked up once each, in file order, and let go of when
    their file is written, so a mapping that reads on access keeps one shard and one layer in memory.

    Args:
        model: shape of the model, `vocab_size` set.
        tensors: every parameter under its name in a single-process Megatron-Core `GPTModel` of the local spec; any
            device and floating-point type.
        output: directory to make.
        mechanisms: that the model was trained with.
        seq_length: longest sequence trained on, in tokens; becomes `max_position_embeddings`.
        dtype: number format of the weights in the files.
        tokenizer_dir: a directory `AutoTokenizer` loads; None exports without a tokenizer.
        max_shard_bytes: largest weight file.
        overwrite: replace a model directory that is already there.
        check: called with the complete directory before it takes its name; what it raises leaves `output` as it was.

    Returns:
        `output`.

    Raises:
        ConversionError: no class expresses the model; tensors are missing, unknown or of the wrong shape; the
            tokenizer cannot be read or does not fit; or `output` is in use.
    """
    modules = exported_modules(model, mechanisms)
    family = choose_family(model, modules=modules)
    table = family.table(model, modules)
    tokenizer = None if tokenizer_dir is None else load_tokenizer(tokenizer_dir, vocab_size=model.vocab_size or 0)
    token_ids = special_token_ids(tokenizer)
    with making_output(output, overwrite=overwrite) as folder:
        family.config(model, seq_length=seq_length, dtype=dtype, token_ids=token_ids, modules=modules).save_pretrained(
            folder
        )
        GenerationConfig(**token_ids).save_pretrained(folder)
        for source in family.code:
            shutil.copyfile(source, folder / source.name)
        if family.extensible:
            copy_extensions(modules, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
            check_tokenizer(tokenizer, folder)
        integers = {tensor.hf for module in modules.values() for tensor in module.tensors if tensor.is_integer}
        shards = plan_shards(table.hf_shapes, dtype=dtype, max_shard_bytes=max_shard_bytes, integers=integers)
        write_shards(table.to_hf(tensors), shards, dtype=dtype, folder=folder, integers=integers)
        if check is not None:
            check(folder)
    return output
