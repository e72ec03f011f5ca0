"""Benchmarks: scripts that print a table and write JSON with machine, versions and command. Never tests."""
