"""DC-AE in plain PyTorch: readable, and the oracle of everything faster."""
