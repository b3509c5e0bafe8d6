"""The long commands of dcae-fast, one file each; cli.py registers them.

A command imports PyTorch, and modules that import PyTorch, only when it runs, so that `--help` answers at once.
"""
