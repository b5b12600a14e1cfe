"""The verbs that the wrappers of a tier know by name: a misspelt one would be treated as any other, silently."""

from __future__ import annotations

from itertools import combinations

from sync_engine.ports import PATIENT, READS, WRITES, Cache, Truth


def test_every_verb_that_is_told_apart_is_one_of_a_tier_and_of_one_kind() -> None:
    assert {
        verb
        for kind in (READS, WRITES, PATIENT)
        for verb in kind
        if not hasattr(Truth, verb) and not hasattr(Cache, verb)
    } == set()
    assert not any(one & other for one, other in combinations((READS, WRITES, PATIENT), 2))
