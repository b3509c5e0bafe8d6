"""Triton kernels, one file per operator: forward, backward and their launchers. All tensors are channels-last."""
