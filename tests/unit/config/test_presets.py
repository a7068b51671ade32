"""Presets: their sizes against numbers worked out by hand, and their place under the keys given beside them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsecod_megatron.config import load_config, preset_names, save_config
from sparsecod_megatron.errors import ConfigError
from tests.helpers.meta import meta_model, parameter_counts

NANO_VOCABULARY = 8192

# Attention is 4 h² and a SwiGLU of width f is 3 h f; a layer adds two norms of h, the model a last norm of h and
# embeddings and output layer of 2 V h, with V = 50,304 or, for nano presets, 8,192.
SIZES = {
    # h 2048, f 8192: a layer 16,777,216 + 50,331,648 + 4,096 = 67,112,960; rest 2,048 + 206,045,184 = 206,047,232
    "dense-1B": (1_279_854_592, 1_279_854_592),  # 16 · 67,112,960 + 206,047,232
    "dense-1B-L12": (1_011_402_752, 1_011_402_752),  # 12 · 67,112,960 + 206,047,232
    "dense-1B-L16": (1_279_854_592, 1_279_854_592),
    "dense-1B-L20": (1_548_306_432, 1_548_306_432),
    "dense-1B-L24": (1_816_758_272, 1_816_758_272),
    "dense-1B-L28": (2_085_210_112, 2_085_210_112),
    "dense-1B-L32": (2_353_661_952, 2_353_661_952),
    # h 1536, f 4608: a layer 9,437,184 + 21,233,664 + 3,072 = 30,673,920; rest 1,536 + 154,533,888
    "dense-400M": (645_318_144, 645_318_144),  # 16 · 30,673,920 + 154,535,424
    # h 768, f 1536: attention 2,359,296, an expert 3,538,944, router 32 · 768 = 24,576, norms 1,536;
    # a layer with 32 + 1 experts 119,170,560, with 4 + 1 20,080,128; rest 768 + 77,266,944
    "moe-400M-2B": (1_983_996_672, 398_549_760),
    # h 2048, f 1024: attention 16,777,216, an expert 6,291,456, router 131,072, norms 4,096;
    # a layer with 64 experts 419,565,568, with 8 67,244,032; rest 206,047,232
    "moe-1B-7B": (6_919_096_320, 1_281_951_744),
    # the same with experts of 12,582,912: a layer with 64 822,218,752, with 8 117,575,680
    "moe-1B-13B-ref": (13_361_547_264, 2_087_258_112),
    # h 1120, f 1120: attention 5,017,600, an expert 3,763,200, router 71,680, norms 2,240;
    # a layer with 64 experts 245,936,320, with 8 35,197,120; 32 layers; rest 1,120 + 112,680,960
    "moe-ablation": (7_982_644_320, 1_238_989_920),
    # h 2048, 16 heads on 4 groups: attention 10,485,760, norms 4,096 + 256 of q and k; dense MLP of 5120 31,457,280;
    # an expert of 512 3,145,728, router 524,288; dense layer 41,947,392; one with 256 + 1 experts 819,466,496, with
    # 8 + 1 39,325,952; rest 2,048 + 643,825,664
    "ling-mini": (16_255_638_528, 1_432_968_192),
    # h 2048, 16 heads of 128 + 64, latent of 512: attention 6,291,456 of queries, 1,179,648 to the latent with its norm
    # 512, 2,097,152 from it, 4,194,304 out; norms 4,096; dense MLP of 10944 67,239,936; an expert of 1408 8,650,752,
    # router 131,072; dense layer 81,007,104; one with 64 + 2 experts 584,847,872, with 6 + 2 83,104,256;
    # rest 2,048 + 419,430,400
    "deepseek-v2-lite": (15_706_484_224, 2_661_150_208),
    # h 128, f 512: a layer 65,536 + 196,608 + 256 = 262,400; rest 128 + 2,097,152 = 2,097,280
    "nano-dense": (6_295_680, 6_295_680),  # 16 · 262,400 + 2,097,280
    "nano-dense-L12": (5_246_080, 5_246_080),  # 12 · 262,400 + 2,097,280
    "nano-dense-L16": (6_295_680, 6_295_680),
    "nano-dense-L20": (7_345_280, 7_345_280),
    "nano-dense-L24": (8_394_880, 8_394_880),
    "nano-dense-L28": (9_444_480, 9_444_480),
    "nano-dense-L32": (10_494_080, 10_494_080),
    # h 96, f 288: a layer 36,864 + 82,944 + 192 = 120,000; rest 96 + 1,572,864
    "nano-dense-narrow": (3_492_960, 3_492_960),  # 16 · 120,000 + 1,572,960
    # h 64, f 128: attention 16,384, an expert 24,576, router 16 · 64 = 1,024, norms 128;
    # a layer with 16 + 1 experts 435,328, with 2 + 1 91,264; rest 64 + 1,048,576
    "nano-moe-shared": (8_013_888, 2_508_864),
    # h 128, f 64: attention 65,536, an expert 24,576, router 2,048, norms 256;
    # a layer with 16 experts 461,056, with 2 116,992; rest 2,097,280
    "nano-moe": (9_474_176, 3_969_152),
    # the same with experts of 49,152: a layer with 16 854,272, with 2 166,144
    "nano-moe-ref": (15_765_632, 4_755_584),
    # h 64, f 64: attention 16,384, an expert 12,288, router 1,024, norms 128;
    # a layer with 16 experts 214,144, with 2 42,112; 32 layers; rest 1,048,640
    "nano-moe-ablation": (7_901_248, 2_396_224),
    # h 64, 4 heads on 2 groups: attention 12,288, norms 128 + 32 of q and k; dense MLP of 160 30,720; an expert of 16
    # 3,072, router 4,096; dense layer 43,168, one with 64 + 1 experts 216,224, with 2 + 1 25,760; rest 1,048,640
    "nano-ling": (5_200_064, 1_581_248),
    # h 64, 4 heads of 16 + 8, latent of 16: attention 13,840, norms 128; dense MLP of 320 61,440; an expert of 40
    # 7,680, router 4,096; dense layer 75,408, one with 64 + 2 experts 524,944, with 6 + 2 79,504; rest 1,048,640
    "nano-deepseek": (14_772_592, 3_191_152),
}


def test_every_preset_has_its_size_here() -> None:
    assert set(SIZES) == set(preset_names())


@pytest.mark.parametrize("name", SIZES)
def test_size(name: str) -> None:
    """Of the model that Megatron-Core builds, on the meta device."""
    vocabulary = [f"model.vocab_size={NANO_VOCABULARY}"] if name.startswith("nano") else []
    config = load_config(None, [f"model.preset={name}", "precision.dtype=fp32", *vocabulary])
    with meta_model(config) as model:
        assert parameter_counts(model, config) == SIZES[name]


def test_nano_presets_are_small_and_as_deep_as_the_papers() -> None:
    nano = [name for name in preset_names() if name.startswith("nano-")]
    paper = [name for name in preset_names() if name not in nano]
    assert [depth(name) for name in nano] == [depth(name) for name in paper]
    assert max(SIZES[name][0] for name in nano) <= 20_000_000


def depth(name: str) -> int:
    return load_config(None, [f"model.preset={name}"]).model.num_layers


@pytest.mark.parametrize("name", [name for name in preset_names() if not re.search("ling|deepseek", name)])
def test_common_to_the_paper(name: str) -> None:
    model = load_config(None, [f"model.preset={name}"]).model
    assert (model.normalization, model.activation, model.rotary_base) == ("RMSNorm", "swiglu", 10000)
    assert (model.init, model.init_method_std, model.norm_placement) == ("normal", 0.02, "pre")
    assert model.untie_embeddings_and_output_weights
    assert model.num_query_groups == model.num_attention_heads
    assert model.vocab_size == (None if name.startswith("nano") else 50304)
    if model.is_moe:
        assert (model.moe_aux_loss_coeff, model.moe_z_loss_coeff) == (1e-2, 1e-3)
        assert model.moe_router_pre_softmax


def test_keys_of_file_and_overrides_win_wherever_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: {num_layers: 5, preset: dense-1B, norm_placement: peri, vocab_size: null}\n")
    model = load_config(path, ["model.hidden_size=512"]).model
    assert (model.preset, model.num_layers, model.hidden_size, model.norm_placement) == ("dense-1B", 5, 512, "peri")
    assert (model.ffn_hidden_size, model.vocab_size) == (8192, None)
    model = load_config(path, ["model.num_attention_heads=8", "model.preset=nano-dense"]).model
    assert (model.preset, model.num_layers, model.hidden_size, model.norm_placement) == ("nano-dense", 5, 128, "peri")
    assert (model.num_attention_heads, model.num_query_groups) == (8, 8)
    assert load_config(path, ["model.preset=null"]).model.ffn_hidden_size == load_config(None).model.ffn_hidden_size


@settings(max_examples=12)
@given(name=st.sampled_from(preset_names()), layers=st.none() | st.integers(1, 40))
def test_resolved_file_keeps_the_name_and_every_value(
    tmp_path_factory: pytest.TempPathFactory, name: str, layers: int | None
) -> None:
    beside = [f"model.num_layers={layers}"] if layers else []
    config = load_config(None, [f"model.preset={name}", *beside])
    path = tmp_path_factory.mktemp("preset") / "config.yaml"
    save_config(config, path)
    assert load_config(path) == config
    # The values stand for themselves: a preset that changes later does not change a run that is resumed.
    path.write_text(path.read_text().replace(f"preset: {name}", "preset: null"))
    values = load_config(path)
    values.model.preset = name
    assert values == config


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("dense1B", ["model.preset: 'dense1B'", "did you mean 'dense-1B'", "moe-1B-7B"]),
        ("gpt", ["model.preset: 'gpt'", "there are dense-1B, "]),
        ("7", ["model.preset: '7' is not a preset; there are dense-1B, "]),
        ("[dense-1B]", ["model.preset: '[dense-1B]' is not a preset; did you mean 'dense-1B'"]),
    ],
)
def test_unknown_name(value: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [f"model.preset={value}"])
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_a_list_is_no_name(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model:\n  preset: [dense-1B]\n")
    with pytest.raises(ConfigError, match=r"model.preset: \['dense-1B'\] is not a name"):
        load_config(tmp_path / "run.yaml")


def test_preset_over_a_resolved_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    save_config(load_config(None, ["model.preset=nano-dense"]), path)
    assert load_config(path, ["model.preset=nano-dense"]).model.preset == "nano-dense"
    with pytest.raises(ConfigError, match="config.yaml sets every model key itself"):
        load_config(path, ["model.preset=nano-dense-L32"])
