"""A deterministic simulation of whole engines: virtual time, chance from a seed, tiers and logs that fail and crash.

``simulate(seed)`` is one run; what it finds once it finds always. ``python -m sync_engine.testing.simulation 7``
replays a seed and tells its story, ``--seeds 10000`` runs many.
"""

from sync_engine.testing.simulation.loop import Process, SimulatedLoop, Stuck
from sync_engine.testing.simulation.world import Failed, Run, World, simulate

__all__ = ["Failed", "Process", "Run", "SimulatedLoop", "Stuck", "World", "simulate"]
