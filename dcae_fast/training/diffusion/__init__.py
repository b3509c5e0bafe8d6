"""The task of training diffusion transformers on cached latents."""
