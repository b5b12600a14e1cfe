"""What a server offers beyond plain Redis, asked for by trying: that needs no rights beyond those used anyway."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from redis.exceptions import ResponseError

from sync_engine.storage.redis.pool import fields

__all__ = ["Capabilities", "capabilities_of", "questions"]


@dataclass(frozen=True, slots=True)
class Capabilities:
    """``json``: JSON items are documents, else strings. ``search``: they can be searched.

    The rest is what the server says of itself; empty or None where it does not say, or not to this user.
    """

    json: bool
    search: bool = False
    server: str = ""
    """``redis`` or ``valkey``."""
    version: str = ""
    modules: Mapping[str, str] = field(default_factory=dict)
    """Name to version."""
    maxmemory_policy: str | None = None
    """As it was when the server first answered; an administrator may change it."""
    protocol: int = 2
    """Of RESP, on our connections."""

    def __str__(self) -> str:
        loaded = ", ".join(f"{name} {version}" for name, version in sorted(self.modules.items()))
        told = [
            " ".join((self.server or "unknown server", self.version)).strip(),
            f"modules: {loaded or 'none'}",
            "JSON documents" if self.json else "JSON as strings",
            "search" if self.search else "no search",
        ]
        return "; ".join(told + ([f"maxmemory-policy {self.maxmemory_policy}"] if self.maxmemory_policy else []))


def questions(prefix: str) -> tuple[tuple[str, ...], ...]:
    """The commands whose replies tell; of keys below ``prefix``, since an ACL may allow us no other."""
    none = f"{prefix}__local__:none"
    return (("HELLO",), ("JSON.MGET", none, "$"), ("FT.SEARCH", none, "*"), ("INFO", "memory"))


def capabilities_of(replies: Sequence[Any]) -> Capabilities:
    """What the replies to ``questions`` tell, RESP2 or RESP3, refusals among them."""
    hello, json, search, memory = replies
    said = {} if isinstance(hello, ResponseError) else _mapping(hello)
    modules = [_mapping(module) for module in said.get("modules", ())]
    return Capabilities(
        json=_known(json),
        search=_known(search),
        server=_text(said.get("server", "")),
        version=_text(said.get("version", "")),
        modules={_text(module.get("name", "")): _version(module.get("ver", 0)) for module in modules},
        protocol=int(said.get("proto", 2)),
        maxmemory_policy=None if isinstance(memory, ResponseError) else fields(memory).get("maxmemory_policy"),
    )


def _known(reply: Any) -> bool:
    """Whether the command exists for us: a refusal of its arguments shows that it does, one of our rights does not."""
    if not isinstance(reply, ResponseError):
        return True
    refusal = str(reply).lower()
    return "unknown command" not in refusal and "permission" not in refusal


def _mapping(reply: Any) -> dict[str, Any]:
    pairs = reply.items() if isinstance(reply, Mapping) else zip(reply[::2], reply[1::2], strict=False)
    return {_text(name): value for name, value in pairs}


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _version(number: Any) -> str:
    if not isinstance(number, int) or number < 10_000:
        return _text(number)
    return f"{number // 10_000}.{number // 100 % 100}.{number % 100}"
