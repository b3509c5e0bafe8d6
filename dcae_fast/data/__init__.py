"""Pictures and latents on disk: datasets, the order of training data, and `cache-latents`, which encodes pictures."""
