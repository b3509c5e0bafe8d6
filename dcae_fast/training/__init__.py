"""Training diffusion transformers on cached latents: in one process or many, resumed exactly."""
