"""The `mechanisms:` section: a mapping from names to settings, typed and bounded as every other section is.

The caller says which names there are and what settings each has: mechanisms stand right of everything here.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from sparsecod_megatron.config.schema import RunConfig
from sparsecod_megatron.config.typed import Update
from sparsecod_megatron.errors import ConfigError

SECTION = "mechanisms"


class Catalogue(Protocol):
    """The mechanisms that there are."""

    @property
    def names(self) -> Iterable[str]:
        """All of them."""

    @property
    def former_keys(self) -> Mapping[tuple[str, str], str]:
        """(key of `model:`, value) → the mechanism that replaces it."""

    @property
    def renames(self) -> bool:
        """Whether former keys are read as the mechanisms that they have become, and not refused."""

    def settings_class(self, name: str) -> type:
        """The dataclass of a mechanism's settings, which is the mechanism."""


def take_former_keys(updates: Sequence[Update], known: Catalogue) -> None:
    """Replace a key of `model:` by the mechanism that it has become, in the configuration of an earlier version's run.

    Raises:
        ConfigError: the key is set to that value in a file that a user writes; names the mechanism.
    """
    for where, content in updates:
        model = content.get("model")
        for (key, value), name in known.former_keys.items():
            if not isinstance(model, dict) or model.get(key) != value:
                continue
            if known.renames:
                del model[key]
                content.setdefault(SECTION, {})[name] = {}
            else:
                raise ConfigError(
                    f"{where}: model.{key}: {value!r} is a mechanism now; write `mechanisms: {{{name}: {{}}}}` instead "
                    f"(as an override, mechanisms.{name}={{}})"
                )


def named_mechanisms(updates: Sequence[Update], known: Catalogue) -> dict[str, type]:
    """Settings' classes of those that the file or an override names, switched off or not.

    Raises:
        ConfigError: there is no mechanism of that name, or it holds no settings.
    """
    named: dict[str, type] = {}
    for where, content in updates:
        section = content.get(SECTION)
        for name, settings in (section if isinstance(section, dict) else {}).items():
            if name not in (names := list(known.names)):
                near = difflib.get_close_matches(str(name), names, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}"
                raise ConfigError(f"{where}: {SECTION}.{name}: no such mechanism; {hint}")
            if settings is not None and not isinstance(settings, dict):
                raise ConfigError(
                    f"{where}: {SECTION}.{name}: {settings!r} is not a section; write keys under it, {{}} for its "
                    "defaults, or null to switch it off"
                )
            named[name] = known.settings_class(name)
    return named


def schema_with(named: Mapping[str, type]) -> type[RunConfig]:
    """RunConfig with a section for each of these mechanisms, None being without it; the same class each time."""
    return _schema_with(tuple(named.items()))


@functools.cache
def _schema_with(named: tuple[tuple[str, type], ...]) -> type[RunConfig]:
    items = [(name, kind | None, None) for name, kind in named]
    section = dataclasses.make_dataclass("Mechanisms", items)
    item = dataclasses.field(default_factory=section)
    return dataclasses.make_dataclass("ConfiguredRun", [(SECTION, section, item)], bases=(RunConfig,))


def with_mechanisms(config: Any) -> RunConfig:
    """What was read by `schema_with`, as a RunConfig."""
    values = {item.name: getattr(config, item.name) for item in dataclasses.fields(RunConfig)}
    section = {item.name: getattr(config.mechanisms, item.name) for item in dataclasses.fields(config.mechanisms)}
    values[SECTION] = {name: settings for name, settings in section.items() if settings is not None}
    return RunConfig(**values)
