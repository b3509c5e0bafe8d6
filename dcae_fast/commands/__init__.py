"""Commands of dcae-fast that have a file of their own; cli.py names them.

A command imports PyTorch and all that needs it when it runs, not before, so that `--help` answers at once.
"""
