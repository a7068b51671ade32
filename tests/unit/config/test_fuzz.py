"""Whatever is typed: a configuration that saves and reads back, or one ConfigError line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sparsecod_megatron.config import load_config, save_config
from sparsecod_megatron.config.schema import RunConfig
from sparsecod_megatron.config.typed import known_keys
from sparsecod_megatron.errors import ConfigError
from sparsecod_megatron.mechanisms import MECHANISMS

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 70)
    | st.sampled_from([10**9, 2**63, 10**40, -(10**40)])
    | st.floats()
    | st.dates()
    | st.text(max_size=12)
    | st.sampled_from(["", "???", "${model}", "${", "pre", "normal", "1e400", "0x10", "!!python/object:os.system x"])
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
KEYS = st.sampled_from(sorted(known_keys(RunConfig)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def load_or_refuse(folder: Path, path: Path | None, overrides: list[str]) -> None:
    """Accepted configurations survive saving; the others give one line."""
    try:
        config = load_config(path, overrides, mechanisms=MECHANISMS)
    except ConfigError as error:
        message = str(error)
        assert message and "\n" not in message
        return
    save_config(config, folder / "saved.yaml")
    again = load_config(folder / "saved.yaml", mechanisms=MECHANISMS)
    assert repr(again) == repr(config)  # and not ==: a NaN that got through would differ from itself


@settings(max_examples=80)
@given(st.lists(st.tuples(KEYS, VALUES), min_size=1, max_size=3))
def test_any_value_of_any_key(folder: Path, pairs: list[tuple[str, Any]]) -> None:
    """As overrides, as a person would type them."""
    flow = [f"{key}={yaml.safe_dump(value, default_flow_style=True, width=10**6).strip()}" for key, value in pairs]
    load_or_refuse(folder, None, [text.removesuffix("\n...").removesuffix("...").strip() for text in flow])


@settings(max_examples=80)
@given(
    pair=st.tuples(KEYS, VALUES), position=st.integers(0, 10**6), damage=st.binary(max_size=4), cut=st.integers(0, 4)
)
@example(pair=("model.num_layers", 2), position=0, damage=b"\x00", cut=0)
def test_any_damage_to_a_file(
    folder: Path, repo_root: Path, pair: tuple[str, Any], position: int, damage: bytes, cut: int
) -> None:
    """A real file with some bytes replaced and one key set to anything."""
    content = (repo_root / "examples" / "configs" / "quickstart_moe.yaml").read_bytes()
    position %= len(content)
    path = folder / "damaged.yaml"
    path.write_bytes(content[:position] + damage + content[position + cut :])
    load_or_refuse(folder, path, [])
    section, _, leaf = pair[0].partition(".")
    nested: Any = pair[1]
    for name in reversed([section, *leaf.split(".")] if leaf else [section]):
        nested = {name: nested}
    path.write_text(yaml.safe_dump(nested), encoding="utf-8")
    load_or_refuse(folder, path, [])


@pytest.mark.parametrize("content", ["a: &x [*x]", "{" * 3000, "? {}\n: 1", "model: {1: 2, true: 3}"])
def test_what_yaml_itself_allows_too_much_of(folder: Path, content: str) -> None:
    """Loops, depth and keys that are no names."""
    path = folder / "odd.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)
