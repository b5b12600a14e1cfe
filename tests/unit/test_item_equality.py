"""When two items are equal, and that ``!=`` agrees with ``==``."""

from __future__ import annotations

from sync_engine import SyncItem


def test_items_that_differ_in_the_engines_notes_alone_are_equal_and_not_unequal() -> None:
    one, two = SyncItem("a", b"x", updated_at=1), SyncItem("a", b"x", updated_at=1, stamp=3)
    assert one == two
    assert not one != two  # noqa: SIM202 - this operator is what is tested
    assert one != SyncItem("a", b"y", updated_at=1)
    assert one != "a"
