"""One segment of the log: what its bytes say, and which of its records are settled.

``scan`` is pure and decides everything that recovery believes about a file; reading and repairing
files is log_folder.py. The rules and their reasons are in docs/log.md.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sync_engine.log_record import (
    FRAME_BYTES,
    HEADER_BYTES,
    SECTOR_BYTES,
    BadRecord,
    Frame,
    Header,
    decode_settled,
    is_settled_mark,
    read_frame,
)

__all__ = ["Scan", "Segment", "gaps", "scan"]


@dataclass(slots=True)
class Segment:
    """A segment file and which of its records are settled (one byte each). Owned by the event loop."""

    path: Path
    first_seq: int
    bytes: int = HEADER_BYTES
    settled: bytearray = field(default_factory=bytearray)
    live: int = 0

    def grow(self, count: int, *, settled: bool = False) -> None:
        """Another ``count`` records were written."""
        self.settled += (b"\1" if settled else b"\0") * count
        self.live += 0 if settled else count

    def holds(self, seq: int) -> bool:
        """Whether the record lies in this segment."""
        return 0 <= seq - self.first_seq < len(self.settled)

    def settle(self, seq: int) -> bool:
        """Note a record as settled; False when it was before."""
        place = seq - self.first_seq
        if self.settled[place]:
            return False
        self.settled[place] = 1
        self.live -= 1
        return True


@dataclass(frozen=True, slots=True)
class Scan:
    """What the bytes of one segment hold. ``end`` is where the last of it ends; beyond is unacknowledged rest.

    ``header`` is None when both copies are damaged: then every byte counts as acknowledged.
    """

    header: Header | None
    frames: Sequence[Frame]
    settled: Sequence[range]
    damage: Sequence[str]
    end: int


def scan(data: bytes | memoryview, first_seq: int) -> Scan:
    """Read a segment that begins with record ``first_seq``.

    Below ``durable_upto`` every byte must be right, and what is not is reported and stepped over.
    Beyond it the first wrong byte ends the segment: nobody was told that those records are safe.
    """
    view = memoryview(data)
    header, damage = _header(view)
    durable_upto = header.durable_upto if header else len(view)
    if durable_upto > len(view):
        damage.append(f"cut at byte {len(view)}, was {durable_upto}")
    frames: list[Frame] = []
    settled: list[range] = []
    last_seq = first_seq - 1
    place = HEADER_BYTES
    while place < len(view):
        found = _believable(view, place, first_seq, last_seq)
        if found is None:
            if place >= durable_upto:
                break
            further = _resync(view, place, first_seq, last_seq, min(durable_upto, len(view)))
            damage.append(f"bytes {place} to {further} are damaged")
            place = further
            continue
        payload = view[found.start : found.end]
        if is_settled_mark(payload):
            try:
                settled += decode_settled(payload)
            except BadRecord as bad:
                damage.append(f"the mark at byte {place} cannot be read: {bad}")
        else:
            frames.append(found)
            last_seq = found.seq
        place = found.end
    return Scan(header, frames, settled, damage, min(place, len(view)))


def gaps(frames: Sequence[Frame], first_seq: int, last_seq: int) -> list[range]:
    """Record numbers from ``first_seq`` to ``last_seq`` that no frame has."""
    missing = []
    expected = first_seq
    for found in frames:
        if found.seq > expected:
            missing.append(range(expected, min(found.seq, last_seq + 1)))
        expected = found.seq + 1
    if expected <= last_seq:
        missing.append(range(expected, last_seq + 1))
    return [gap for gap in missing if gap]


def _header(view: memoryview) -> tuple[Header | None, list[str]]:
    copies = [Header.decode(bytes(view[at : at + SECTOR_BYTES])) for at in (0, SECTOR_BYTES)]
    damage = [f"copy {number} of the header is damaged" for number, copy in enumerate(copies, 1) if copy is None]
    # Power may fail between the two sectors; the copy that tells of more is the younger one.
    return max((copy for copy in copies if copy), key=lambda copy: copy.durable_upto, default=None), damage


def _believable(view: memoryview, place: int, first_seq: int, last_seq: int) -> Frame | None:
    """A record with a right checksum and a number that may follow ``last_seq`` (marks repeat the last one)."""
    found = read_frame(view, place, first_seq)
    if found is None or not 0 <= found.seq - last_seq <= len(view):
        return None
    return found if found.seq > last_seq or is_settled_mark(view[found.start :]) else None


def _resync(view: memoryview, place: int, first_seq: int, last_seq: int, end: int) -> int:
    """Where the next believable record begins after a damaged one, or ``end``."""
    if place + FRAME_BYTES <= len(view):
        follower = place + FRAME_BYTES + int(struct.unpack_from("<I", view, place + 4)[0])
        found = _believable(view, follower, first_seq, last_seq)
        # Only a direct successor: a wrong length may point to a right record further on.
        if found and found.seq <= last_seq + 2:
            return follower
    for candidate in range(place + 1, end - FRAME_BYTES):
        # The number is looked at first: it spares a checksum at nearly every byte.
        seq = struct.unpack_from("<Q", view, candidate + 8)[0]
        if 0 <= seq - last_seq <= len(view) and _believable(view, candidate, first_seq, last_seq):
            return candidate
    return end
