"""The task of training autoencoders on pictures."""
