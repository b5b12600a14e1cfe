"""What a server offers beyond plain Redis, asked for by trying: that needs no rights beyond those used anyway."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Capabilities", "json_answers"]


@dataclass(frozen=True, slots=True)
class Capabilities:
    """``json``: JSON items are documents, else strings."""

    json: bool


def json_answers(refusal: str) -> bool:
    """Whether a refusal of a RedisJSON command still shows that the command exists."""
    # An ACL user who may not run it cannot keep documents either, so only "unknown command" needs no telling apart.
    return "unknown command" not in refusal.lower() and "permission" not in refusal.lower()
