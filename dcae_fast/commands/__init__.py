"""Commands of dcae-fast that have a file of their own; cli.py names them."""
