"""Biographies: people with names and attributes in sentences, to measure how many bits a model holds per parameter."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from sparsecod_megatron.config.fields import at_least, between
from sparsecod_megatron.data.synthetic.knowledge import Knowledge, Piece
from sparsecod_megatron.data.synthetic.task import END_OF_TEXT, Draw, Sample, Task, shuffled

_NAMES = ("first", "middle", "last")
_VALUES = ("month", "day", "year", "pronoun", "city", "university", "field", "employer")
_SENTENCES = ((0, 1, 2), (3, 4), (5,), (6,), (7,))
"""Values that each sentence tells, after its words."""
_FEWEST_WORDS, _MOST_WORDS = 2, 5
_LONGEST = 1 + len(_NAMES) + len(_VALUES) + _MOST_WORDS * len(_SENTENCES)


@dataclass
class Biographies(Task):
    """bioS(N) in a vocabulary of its own: every name, value and word is one token, and sentences have no grammar.

    A biography is the end-of-text token, the three tokens of a name, and five sentences, each a template of two to five
    words and its values: date of birth, pronoun and city, university, field, employer. Names and values are scored,
    words are not. Biographies follow each other in a sample; every epoch over the people is a permutation, so that each
    has been seen equally often after it. Held-out samples tell of the same people in templates drawn afresh.

    Source: Allen-Zhu and Li (arXiv 2404.05405); sizes of the defaults from facebookresearch/PhysicsLM4 @7580696,
    `data-synthetic-pretrain/Capo-bioS-bioR`. Deviations: words are tokens without meaning; the employer's city, which
    follows from the employer and adds no bits, is left out; the pronoun is drawn, not the parity of a number.
    """

    num_people: int = at_least(1, 20_000)
    name_choices: list[int] = field(default_factory=lambda: [400, 400, 1000])
    """First, middle and last names that there are; N₀ is their product."""
    value_choices: list[int] = field(default_factory=lambda: [12, 28, 200, 2, 200, 300, 100, 263])
    """Months, days, years, pronouns, cities, universities, fields and employers that there are; S₀ is their product."""
    num_templates: int = at_least(1, 50)
    """Templates of each sentence."""
    num_words: int = at_least(1, 64)
    """Words that templates are made of."""
    facts_seed: int = between(0, 2**31, 0)
    """Seed of people and templates; `train.seed` decides only who comes when, in which template."""

    def vocabulary(self) -> list[str]:
        """End of text, names, values, words."""
        pools = zip((*_NAMES, *_VALUES, "word"), (*self._choices, self.num_words), strict=True)
        return [END_OF_TEXT, *(f"{name}{number}" for name, size in pools for number in range(size))]

    def problems(self, seq_length: int) -> Iterator[str]:
        """Numbers of choices, names for everybody, room for a biography."""
        for key, names in (("name_choices", _NAMES), ("value_choices", _VALUES)):
            sizes = getattr(self, key)
            if len(sizes) != len(names) or min(sizes) < 1:
                yield f"data.synthetic.{key}: {sizes} is not {len(names)} numbers from 1, of {', '.join(names)}"
        if (names_there := math.prod(self.name_choices)) < self.num_people:
            yield (
                f"data.synthetic.num_people: {self.num_people} is above the {names_there} names of name_choices; "
                "lower it"
            )
        if seq_length < _LONGEST:
            yield f"data.seq_length: {seq_length} holds no biography; use at least {_LONGEST}"

    def make(self, draw: Draw, seq_length: int) -> Sample:
        """As many biographies as always fit; the rest is end of text."""
        generator, count = draw.generator(), seq_length // _LONGEST
        names, values = self._people
        tokens, scored = np.zeros(seq_length + 1, dtype=np.int64), np.zeros(seq_length + 1, dtype=bool)
        end = 0
        for slot in range(draw.number * count, (draw.number + 1) * count):
            epoch, place = divmod(slot, self.num_people)
            person = shuffled(self.num_people, draw.seed, int(draw.held_out), epoch)[place]
            parts: list[tuple[np.ndarray, bool]] = [(np.zeros(1, dtype=np.int64), False), (names[person], True)]
            for templates, told in zip(self._templates, _SENTENCES, strict=True):
                parts.append((templates[generator.integers(len(templates))], False))
                parts.append((values[person, list(told)], True))
            for ids, is_scored in parts:
                tokens[end : end + len(ids)], scored[end : end + len(ids)] = ids, is_scored
                end += len(ids)
        return Sample(tokens[:-1], tokens[1:], scored[1:])

    def classes(self) -> dict[str, np.ndarray]:
        """Names, then values."""
        first = 1 + sum(self.name_choices)
        return {"name": np.arange(1, first), "value": np.arange(first, first + sum(self.value_choices))}

    def knowledge(self) -> Knowledge:
        """Names of N people among N₀, and values among S₀."""
        names = Piece(len(_NAMES), math.log(math.prod(self.name_choices)), least=math.log(self.num_people))
        values = Piece(len(_VALUES), math.log(math.prod(self.value_choices)))
        return Knowledge(self.num_people, {"name": names, "value": values})

    @property
    def _choices(self) -> tuple[int, ...]:
        return (*self.name_choices, *self.value_choices)

    @functools.cached_property
    def _people(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids of names `[people, 3]`, all different, and of values `[people, 8]`."""
        generator = np.random.default_rng([self.facts_seed, 0])
        numbers = generator.choice(math.prod(self.name_choices), size=self.num_people, replace=False)
        names = np.stack(np.unravel_index(numbers, self.name_choices), axis=1)
        values = generator.integers(self.value_choices, size=(self.num_people, len(_VALUES)))
        starts = np.array([*itertools.accumulate(self._choices, initial=1)][:-1])
        return names + starts[: len(_NAMES)], values + starts[len(_NAMES) :]

    @functools.cached_property
    def _templates(self) -> list[list[np.ndarray]]:
        """Word ids of each sentence's templates."""
        generator, first = np.random.default_rng([self.facts_seed, 1]), 1 + sum(self._choices)

        def template() -> np.ndarray:
            length = generator.integers(_FEWEST_WORDS, _MOST_WORDS + 1)
            return first + generator.integers(self.num_words, size=length)

        return [[template() for _ in range(self.num_templates)] for _ in _SENTENCES]
