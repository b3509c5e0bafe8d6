"""Benchmarks: `python -m benchmarks` measures, checks and writes benchmarks/results/<gpu>.json."""
