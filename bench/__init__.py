"""Benchmarks: ``python -m bench layers | memory | overhead`` and ``python -m pytest bench --benchmark-only``."""
