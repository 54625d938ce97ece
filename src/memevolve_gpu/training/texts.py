"""Service samples: texts like those that an encoder's memory units turn into, for stores that hold too few units.

They train an index and nothing else: they are never stored as units and never found.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from itertools import accumulate

import numpy as np

from ..errors import ConfigurationError
from .words import DOMAINS, SETTINGS, Topic

__all__ = ["SAMPLE_TYPES", "available_texts", "sample_texts"]

SAMPLE_TYPES = ("lesson", "skill", "tool", "abstraction")

_Choices = tuple[tuple[str, str], ...]
"""Phrases, each with the name of its topic."""


def sample_texts(count: int, *, seed: int, proportions: Mapping[str, float] | None = None) -> list[str]:
    """Distinct texts of the four types, in random order.

    Each reads as a unit's text does: its content, then two tags and its type. The same arguments give the same texts,
    and a smaller ``count`` with the same seed and proportions a part of them, so that embeddings may be kept.

    Args:
        count: how many.
        seed: decides which.
        proportions: how many of each type relative to the others, such as the counts of types in a store; types other
            than the four are passed over. None, or none of the four, gives equal parts.

    Raises:
        ConfigurationError: ``count`` is negative or exceeds what can be made, or a proportion is no finite positive
            number.
    """
    if count < 0:
        raise ConfigurationError(f"count must not be negative, got {count}")
    shares = _shares(count, _weights(proportions))
    texts: list[str] = []
    for kind, share in shares.items():
        most = available_texts(kind)
        if share > most:
            raise ConfigurationError(f"count {count} asks for {share} texts of type {kind}; at most {most} exist")
        chosen = _generator(seed, kind).permutation(most)[:share]
        texts.extend(_text(kind, int(number)) for number in chosen)
    order = _generator(seed, "order").permutation(len(texts))
    return [texts[place] for place in order]


def available_texts(kind: str) -> int:
    """How many distinct texts of a type can be made."""
    return sum(_domain_size(kind, domain) for domain in DOMAINS)


def _weights(proportions: Mapping[str, float] | None) -> dict[str, float]:
    weights = {kind: float((proportions or {}).get(kind, 0.0)) for kind in SAMPLE_TYPES}
    for kind, weight in weights.items():
        if not 0.0 <= weight < math.inf:
            raise ConfigurationError(f"proportions[{kind!r}] must be a finite number from 0 on, got {weight}")
    return weights if sum(weights.values()) > 0 else dict.fromkeys(SAMPLE_TYPES, 1.0)


def _shares(count: int, weights: dict[str, float]) -> dict[str, int]:
    """Whole numbers that add up to ``count``; the differences of rounded running sums."""
    total = sum(weights.values())
    ends = [round(count * end / total) for end in accumulate(weights.values())]
    return {kind: end - start for kind, start, end in zip(weights, [0, *ends], ends, strict=False)}


def _generator(seed: int, purpose: str) -> np.random.Generator:
    digest = hashlib.blake2b(f"{seed} {purpose}".encode(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


def _text(kind: str, number: int) -> str:
    """The ``number``-th text of a type."""
    for domain in DOMAINS:
        size = _domain_size(kind, domain)
        if number < size:
            return _in_domain(kind, domain, number)
        number -= size
    raise ConfigurationError(f"only {available_texts(kind)} texts of type {kind} exist")


def _in_domain(kind: str, domain: str, number: int) -> str:
    slots, sentence = _SENTENCES[kind](domain)
    number, place = divmod(number, len(SETTINGS[domain]))
    words, tags = [], []
    for choices in slots:
        number, at = divmod(number, len(choices))
        words.append(choices[at][0])
        tags.append(choices[at][1])
    first, second = tags[0], tags[-1] if tags[-1] != tags[0] else domain
    return f"{' '.join(filter(None, (sentence.format(*words), SETTINGS[domain][place])))} {first} {second} {kind}"


def _domain_size(kind: str, domain: str) -> int:
    slots, _ = _SENTENCES[kind](domain)
    return math.prod(len(choices) for choices in slots) * len(SETTINGS[domain])


def _phrases(domain: str, of: Callable[[Topic], tuple[str, ...]]) -> _Choices:
    return tuple((phrase, topic.name) for topic in DOMAINS[domain] for phrase in of(topic))


def _lesson(domain: str) -> tuple[list[_Choices], str]:
    slots = [_phrases(domain, lambda topic: topic.activities), _phrases(domain, lambda topic: topic.failures)]
    return slots, "Regular {0} prevents {1}"


def _skill(domain: str) -> tuple[list[_Choices], str]:
    slots = [_phrases(domain, lambda topic: topic.techniques), _phrases(domain, lambda topic: topic.gains)]
    return slots, "Use {0} to achieve {1}"


def _tool(domain: str) -> tuple[list[_Choices], str]:
    slots = [_phrases(domain, lambda topic: topic.tools), _phrases(domain, lambda topic: topic.chores)]
    return slots, "Create {0} for {1} automation"


def _abstraction(domain: str) -> tuple[list[_Choices], str]:
    """The two factors stand in different topics, so that nothing is balanced against itself."""
    topics = DOMAINS[domain]
    half = len(topics) // 2
    first = tuple((phrase, topic.name) for topic in topics[:half] for phrase in topic.factors)
    second = tuple((phrase, topic.name) for topic in topics[half:] for phrase in topic.factors)
    return [first, second, _phrases(domain, lambda topic: topic.gains)], "Balance between {0} and {1} enables {2}"


_SENTENCES: dict[str, Callable[[str], tuple[list[_Choices], str]]] = {
    "lesson": _lesson,
    "skill": _skill,
    "tool": _tool,
    "abstraction": _abstraction,
}
