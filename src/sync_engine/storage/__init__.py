"""Tiers: adapters that keep items, each behind the ports of `sync_engine.ports`."""
