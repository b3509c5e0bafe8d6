"""Benchmarks: `python -m benchmarks` checks and times all contenders, and writes benchmarks/results/<gpu>.json."""
