from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from sparsecod_megatron.config import ModelConfig
from sparsecod_megatron.errors import ConversionError
from sparsecod_megatron.hf import export_model
from tests.helpers.reference_gpt import random_tensors
from tests.unit.hf.models import MODELS, tiny

TEXT = "the deep layers add little to what the shallow layers have said"


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def export(model: ModelConfig, output: Path, **changes: object) -> Path:
    arguments = {"seq_length": 24, "dtype": torch.float32, "tokenizer_dir": None} | changes
    return export_model(model, random_tensors(model), output, **arguments)  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_configuration_says_what_was_trained(tmp_path: Path, tokenizer_dir: Path) -> None:
    model = tiny(num_query_groups=2, kv_channels=14, layernorm_epsilon=3e-6)
    export(model, tmp_path / "m", dtype=torch.bfloat16, tokenizer_dir=tokenizer_dir)
    config = AutoConfig.from_pretrained(tmp_path / "m")
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.dtype == torch.bfloat16
    assert config.max_position_embeddings == 24
    assert (config.rms_norm_eps, config.head_dim, config.num_key_value_heads) == (3e-6, 14, 2)
    assert config.rope_parameters["rope_theta"] == 500
    assert json.loads((tmp_path / "m" / "config.json").read_text())["rope_theta"] == 500
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, None)
    generation = GenerationConfig.from_pretrained(tmp_path / "m")
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, None)


@pytest.mark.parametrize("name", ["gqa", "heads that do not divide", "moe", "moe shared"])
def test_the_tokenizer_loads_from_the_export_and_gives_the_same_tokens(
    name: str, tmp_path: Path, tokenizer_dir: Path
) -> None:
    export(MODELS[name], tmp_path / "m", tokenizer_dir=tokenizer_dir)
    expected = AutoTokenizer.from_pretrained(tokenizer_dir)
    found = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert found(TEXT)["input_ids"] == expected(TEXT)["input_ids"]
    assert found.decode(found(TEXT)["input_ids"]).strip() == TEXT
    assert not any(str(tokenizer_dir).encode() in content for content in contents(tmp_path / "m").values())


def test_generate_works_on_the_export(tmp_path: Path, tokenizer_dir: Path) -> None:
    export(MODELS["moe shared"], tmp_path / "m", tokenizer_dir=tokenizer_dir)
    tokens = AutoTokenizer.from_pretrained(tmp_path / "m")(TEXT, return_tensors="pt").input_ids[:, :8]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    generated = model.generate(tokens, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    assert generated.shape == (1, 11)


@pytest.mark.parametrize("name", ["gqa", "moe shared"])
def test_the_same_tensors_give_the_same_bytes(name: str, tmp_path: Path, tokenizer_dir: Path) -> None:
    model, tensors = MODELS[name], random_tensors(MODELS[name])
    reversed_tensors = dict(reversed(tensors.items()))
    for folder, given in (("a", tensors), ("b", reversed_tensors)):
        export_model(
            model,
            given,
            tmp_path / folder,
            seq_length=24,
            dtype=torch.bfloat16,
            tokenizer_dir=tokenizer_dir,
            max_shard_bytes=9000,
        )
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 2


def test_shards_hold_the_single_files_tensors(tmp_path: Path) -> None:
    model = MODELS["moe"]
    export(model, tmp_path / "whole")
    export(model, tmp_path / "cut", max_shard_bytes=9000)
    with safe_open(tmp_path / "whole" / "model.safetensors", framework="pt") as whole:
        assert whole.metadata() == {"format": "pt"}
        expected = {name: whole.get_tensor(name) for name in whole.keys()}  # noqa: SIM118 - no iteration without keys()
    weight_map = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())["weight_map"]
    assert weight_map.keys() == expected.keys()
    for name, filename in weight_map.items():
        with safe_open(tmp_path / "cut" / filename, framework="pt") as shard:
            assert torch.equal(shard.get_tensor(name), expected[name])
    whole_model, cut_model = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("whole", "cut"))
    tokens = torch.arange(10).unsqueeze(0)
    assert torch.equal(whole_model(tokens).logits, cut_model(tokens).logits)


def test_an_occupied_output_is_refused_and_left_alone(tmp_path: Path) -> None:
    export(tiny(), tmp_path / "m")
    before = contents(tmp_path / "m")
    with pytest.raises(ConversionError, match="is not empty"):
        export(tiny(num_layers=1), tmp_path / "m")
    assert contents(tmp_path / "m") == before
    (tmp_path / "file").write_text("")
    with pytest.raises(ConversionError, match="is a file"):
        export(tiny(), tmp_path / "file")


def test_an_empty_directory_is_filled_and_a_model_directory_overwritten_when_asked(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    export(tiny(), tmp_path / "m")
    export(tiny(num_layers=1), tmp_path / "m", overwrite=True)
    assert AutoConfig.from_pretrained(tmp_path / "m").num_hidden_layers == 1
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_only_model_directories_are_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConversionError, match="not a model directory to overwrite"):
        export(tiny(), tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").exists()


def test_a_failed_check_leaves_the_old_model_and_nothing_else(tmp_path: Path) -> None:
    export(tiny(), tmp_path / "m")
    before = contents(tmp_path / "m")

    def refuse(folder: Path) -> None:
        assert AutoConfig.from_pretrained(folder).num_hidden_layers == 1
        raise ConversionError("differs")

    with pytest.raises(ConversionError, match="differs"):
        export(tiny(num_layers=1), tmp_path / "m", overwrite=True, check=refuse)
    assert contents(tmp_path / "m") == before
    with pytest.raises(ConversionError, match="differs"):
        export(tiny(num_layers=1), tmp_path / "other", check=refuse)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path, tokenizer_dir: Path) -> None:
    with pytest.raises(ConversionError, match=r"ids up to \d+, more than model.vocab_size=20 rows"):
        export(tiny(vocab_size=20), tmp_path / "m", tokenizer_dir=tokenizer_dir)
    assert not any(tmp_path.iterdir())


def test_an_unreadable_tokenizer_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="no such tokenizer directory"):
        export(tiny(), tmp_path / "m", tokenizer_dir=tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConversionError, match="AutoTokenizer cannot load it") as caught:
        export(tiny(), tmp_path / "m", tokenizer_dir=tmp_path / "empty")
    assert "\n" not in str(caught.value)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "tokenizer.json").write_text("{")
    with pytest.raises(ConversionError, match="AutoTokenizer cannot load it"):
        export(tiny(), tmp_path / "m", tokenizer_dir=tmp_path / "damaged")
