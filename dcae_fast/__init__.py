"""dcae_fast: DC-AE and the diffusion transformers in its latent space, as fast as the hardware allows."""
