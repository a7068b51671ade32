from __future__ import annotations

import pytest

from sparsecod_megatron.config import load_config
from sparsecod_megatron.config.blend import Blend, parse_blend
from sparsecod_megatron.errors import ConfigError


@pytest.mark.parametrize(
    ("value", "blend"),
    [
        ("a", Blend(("a",))),
        (["a", "b"], Blend(("a", "b"))),
        ([0.3, "a", 7, "b"], Blend(("a", "b"), (0.3, 7.0))),
    ],
)
def test_blends_are_read(value, blend):
    assert parse_blend("data.train", value) == blend


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[]", r"data.train: \[\] is not a blend; give a prefix, \[A, B\], or \[0.3, A, 0.7, B\]"),
        ("[0.3, a, b]", "is not a blend"),
        ("[a, 0.3]", "is not a blend"),
        ("[true, a]", "is not a blend"),
        ("{a: 0.3}", "is not a blend"),
        ("[0, a, 1, b]", "weight 0.0 is not above 0"),
        ("[.inf, a, 1, b]", "weight inf is not above 0"),
        ("[a, b, a]", "a is listed twice"),
    ],
)
def test_what_is_no_blend_is_one_line(value, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, ["data.tokenizer=t", f"data.train={value}"])


def test_a_prefix_may_look_like_a_number():
    assert parse_blend("data.train", load_config(None, ["data.tokenizer=t", "data.train=3"]).data.train) == Blend(
        ("3",)
    )


def test_a_blend_survives_the_configuration_file(tmp_path):
    from sparsecod_megatron.config import save_config

    config = load_config(None, ["data.tokenizer=t", "data.train=[0.3, a, 0.7, b]", "data.validation=[a, b]"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert parse_blend("data.train", config.data.train).weights == (0.3, 0.7)
