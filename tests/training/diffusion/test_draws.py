"""Times, noise and dropped labels are the same on any number of ranks, and differ by seed and step."""

import torch
from small_training import CPU

from dcae_fast.models.diffusion_zoo import diffusion_config
from dcae_fast.training.diffusion.draws import draw


def test_draws():
    config = diffusion_config("dc-ae-f64c128-in-1.0-uvit-h-in-512px")
    whole = draw(config, 12, range(12), 0, 7, CPU)
    assert whole.noise.shape == (12, 128, 8, 8) and whole.t.min() >= 1 and whole.t.max() <= 1000
    for ranks in (2, 3):
        parts = [draw(config, 12, range(12 * r // ranks, 12 * (r + 1) // ranks), 0, 7, CPU) for r in range(ranks)]
        for name in ("t", "noise", "dropped"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    for seed, step in ((0, 8), (1, 7)):
        other = draw(config, 12, range(12), seed, step, CPU)
        assert not torch.equal(other.noise, whole.noise) and not torch.equal(other.t, whole.t)
    many = torch.cat([draw(config, 64, range(64), 0, step, CPU).dropped for step in range(50)])
    assert 0.08 < many.float().mean() < 0.12
