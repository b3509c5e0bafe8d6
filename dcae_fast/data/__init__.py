"""Pictures and latents on disk: datasets of both, the order that training sees them in, and the cache between them."""
