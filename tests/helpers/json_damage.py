"""Any value at any place of a JSON document, for tests that feed readers with what nobody meant to write."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**40) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
)


def places(content: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of keys and indices to the document and everything in it."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [place, *(deeper for key, value in items for deeper in places(value, (*place, key)))]


def replaced(content: Any, place: tuple[Any, ...], value: Any) -> Any:
    """The document with another value at one place."""
    if not place:
        return value
    copied: Any = content.copy()
    copied[place[0]] = replaced(content[place[0]], place[1:], value)
    return copied
