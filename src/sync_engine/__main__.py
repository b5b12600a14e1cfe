"""``python -m sync_engine`` is the command ``sync-engine``."""

from __future__ import annotations

from sync_engine.cli import main

if __name__ == "__main__":
    main()
