"""YAML and overrides to a run: types, order, round trip, and every mistake in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsecod_megatron.config import RunConfig, load_config, save_config
from sparsecod_megatron.errors import ConfigError


def message(*overrides: str, path: Path | None = None) -> str:
    """The one line that a wrong configuration gives."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_defaults_are_complete() -> None:
    config = load_config(None)
    assert config.model.num_query_groups == config.model.num_attention_heads
    assert config.model.kv_channels == 64
    assert config.decay_steps == config.train.train_steps


def test_a_saved_run_that_is_made_longer_decays_later(tmp_path: Path) -> None:
    save_config(load_config(None, ["train.train_steps=10"]), tmp_path / "run.yaml")
    assert load_config(tmp_path / "run.yaml", ["train.train_steps=17"]).decay_steps == 17
    assert load_config(tmp_path / "run.yaml", ["train.train_steps=17", "schedule.lr_decay_steps=12"]).decay_steps == 12


def test_file_then_overrides_in_order(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("optimizer: {lr: 1e-3}\nmodel: {num_layers: 3}\n")
    config = load_config(path, ["model.num_layers=5", "model.num_layers=7", "megatron.recompute_granularity=selective"])
    assert (config.optimizer.lr, config.model.num_layers) == (1e-3, 7)
    assert config.megatron == {"recompute_granularity": "selective"}


def test_prefix_stands_for_three_paths() -> None:
    data = load_config(None, ["data.prefix=corpus", "data.validation=other_val"]).data
    assert (data.train, data.validation, data.tokenizer) == ("corpus_train", "other_val", "corpus_tokenizer")


@settings(max_examples=30)
@given(
    layers=st.integers(1, 100),
    groups=st.sampled_from([1, 2, 4, 8]),
    lr=st.floats(1e-8, 1.0, allow_nan=False),
    experts=st.none() | st.integers(2, 64),
    seed=st.integers(0, 2**31),
)
def test_saved_configuration_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory, layers: int, groups: int, lr: float, experts: int | None, seed: int
) -> None:
    config = load_config(
        None,
        [
            f"model.num_layers={layers}",
            "model.num_attention_heads=8",
            f"model.num_query_groups={groups}",
            f"optimizer.lr={lr!r}",
            f"model.num_moe_experts={experts if experts else 'null'}",
            f"train.seed={seed}",
        ],
    )
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    save_config(config, path)
    assert load_config(path) == config


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("model.num_layer=3", ["model.num_layer'", "did you mean 'model.num_layers'?"]),
        ("hidden_size=3", ["unknown key 'hidden_size'", "model.hidden_size"]),
        ("nope=1", ["unknown key 'nope'", "keys of the file"]),
        ("optimizer.lr=abc", ["optimizer.lr", "'abc'", "Float"]),
        ("model.num_layers=2.5", ["model.num_layers", "2.5", "Integer"]),
        ("model=3", ["model=3"]),
        ("statistics.variance.interval=null", ["statistics.variance.interval"]),
        ("model.init=xavier", ["model.init", "'xavier'", "normal, scaled"]),
        ("model.num_layers=0", ["model.num_layers", "0 is below 1"]),
        ("model.hidden_dropout=1", ["model.hidden_dropout", "1.0 is not below 1"]),
        ("model.mix_post_fraction=1.5", ["model.mix_post_fraction", "1.5 is above 1"]),
        ("optimizer.adam_beta2=1", ["optimizer.adam_beta2", "1.0 is not below 1"]),
        ("optimizer.adam_eps=0", ["optimizer.adam_eps", "0.0 is not above 0"]),
        ("optimizer.lr=.inf", ["optimizer.lr: inf is non-finite"]),
        ("train.step_timeout_s=.nan", ["train.step_timeout_s: nan is non-finite"]),
        ("train.seed=10000000000000000000", ["train.seed", "is above 2147483648"]),
        ("megatron.glu_linear_offset=.inf", ["megatron.glu_linear_offset: inf is not a number"]),
        ("no equals sign", ["section.key=value"]),
        ("a..b=1", ["section.key=value"]),
        ("optimizer.lr=[1", ["not valid YAML"]),
        ("model.num_layers=${nothing}", ["model.num_layers"]),
    ],
)
def test_override_mistakes(override: str, parts: list[str]) -> None:
    text = message(override)
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("model: {num_layer: 3}", "did you mean 'model.num_layers'?"),
        ("model: [1, 2", "not valid YAML"),
        ("- a\n- b", "holds a list"),
        ("model: 3", "model"),
    ],
)
def test_file_mistakes_name_the_file(tmp_path: Path, content: str, part: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(content)
    text = message(path=path)
    assert part in text and "wrong.yaml" in text


def test_missing_and_binary_files(tmp_path: Path) -> None:
    assert "no such file" in message(path=tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    assert "binary.yaml" in message(path=tmp_path / "binary.yaml")
    assert "cannot be read" in message(path=tmp_path)


def test_empty_file_is_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    assert load_config(tmp_path / "empty.yaml") == load_config(None)
    assert isinstance(load_config(None), RunConfig)


@given(st.text(max_size=40), st.text(max_size=40))
def test_no_override_escapes_as_another_error(key: str, value: str) -> None:
    """Whatever is typed, the answer is a configuration or one ConfigError."""
    try:
        load_config(None, [f"{key}={value}"])
    except ConfigError as error:
        assert str(error)


@pytest.mark.parametrize(
    "text", ["2024_01_01", "0123", "1e3", "12:30", "no", "true", ".5", "runs/a #1", "a: b", "[a", "x'", "2024-01-01"]
)
def test_text_is_what_was_typed(tmp_path: Path, text: str) -> None:
    """Of YAML 1.1's readings only null is left; a file's comments and quotes are YAML's own."""
    assert load_config(None, [f"logging.run_dir={text}"]).logging.run_dir == text
    if not text.startswith("["):  # there, a list
        assert load_config(None, [f"data.train={text}", "data.tokenizer=t"]).data.train == text
    quoted = text if text.replace("_", "").replace(":", "").isalnum() else f'"{text}"'
    (tmp_path / "run.yaml").write_text(f"logging:\n  run_dir: {quoted}\n  wandb: {{name: {quoted}}}\n")
    logging = load_config(tmp_path / "run.yaml").logging
    assert (logging.run_dir, logging.wandb.name) == (text, text)
    save_config(load_config(tmp_path / "run.yaml"), tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml").logging == logging


def test_quotes_null_and_lists_keep_their_meaning() -> None:
    assert load_config(None, ["logging.run_dir='a b'"]).logging.run_dir == "a b"
    assert load_config(None, ['logging.run_dir="a\\tb"']).logging.run_dir == "a\tb"
    assert load_config(None, ["checkpoint.init_from=null"]).checkpoint.init_from is None
    assert "run_dir" in message("logging.run_dir=null")
    data = load_config(None, ["data.train=[0.3, 2024_01_01, 7e-1, 0123]", "data.tokenizer=t"]).data
    assert data.train == [0.3, "2024_01_01", 0.7, "0123"]
    assert load_config(None, ["evaluation.tasks=[no, 12:30, 010]"]).evaluation.tasks == ["no", "12:30", "010"]


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config = load_config(None, ["logging.run_dir=~/runs/a", "data.train=[~/a, ~/b]", "data.tokenizer=~/t"])
    assert config.logging.run_dir == "/home/me/runs/a"
    assert (config.data.train, config.data.tokenizer) == (["/home/me/a", "/home/me/b"], "/home/me/t")


def test_numbers_are_decimal() -> None:
    assert load_config(None, ["train.seed=010"]).train.seed == 10
    assert load_config(None, ["train.rampup_batch_size=[02,2,0100]"]).train.rampup_batch_size == [2, 2, 100]
    assert "train.seed" in message("train.seed=0x10") and "train.seed" in message("train.seed=1:30")
    assert load_config(None, ["optimizer.lr=1e-4"]).optimizer.lr == 1e-4
    assert load_config(None, ["train.spike_skip=no"]).train.spike_skip is False


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            "train:\n  seed: 1\n  eval_steps: 2\n  seed: 3\n",
            "train.seed: given on line 2 and again on line 4; keep one",
        ),
        ("train: {seed: 1}\nmodel: {}\ntrain: {seed: 3}\n", "train: given on line 1 and again on line 3; keep one"),
        ("megatron:\n  a: 1\n  a: 1\n", "megatron.a: given on line 2 and again on line 3; keep one"),
    ],
)
def test_a_key_that_stands_twice_is_refused(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "twice.yaml").write_text(content)
    assert message(path=tmp_path / "twice.yaml") == f"{tmp_path / 'twice.yaml'}: {said}"


def test_a_dotted_key_of_a_file_and_a_field_of_megatron_are_shown_their_place(tmp_path: Path) -> None:
    (tmp_path / "dotted.yaml").write_text("optimizer.lr: 3\n")
    assert "unknown key 'optimizer.lr'; in a file, write 'lr' under `optimizer:`" in message(
        path=tmp_path / "dotted.yaml"
    )
    assert "did you mean 'megatron.bucket_size'?" in message("parallel.bucket_size=3")
