"""Benchmarks of the fused log-prob ops against their peers: run, measured, never asserted here. Not shipped with the packages."""
