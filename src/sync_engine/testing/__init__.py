"""Test kit: a clock, tiers with faults, contract suites and pytest fixtures."""
