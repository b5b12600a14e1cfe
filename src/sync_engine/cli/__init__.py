"""The command line ``sync-engine``: ``app`` has the commands, ``demo`` the demonstration."""

from __future__ import annotations

from sync_engine.cli.app import main

__all__ = ["main"]
