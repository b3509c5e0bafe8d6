"""DC-AE and the transformers in its latent space, plain PyTorch: readable, and the oracle of everything faster."""
