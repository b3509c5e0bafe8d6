"""Sampling latents and the losses that train the networks for it, under the original's names.

    network = guided(model, labels, null_label=1000, scale=1.5)
    z = SAMPLERS["DPM_Solver"](network, torch.randn(len(labels), 128, 8, 8))

Every sampler is a function sample(network, noise, steps, generator, run) -> latents:

network: called as network(x, t) with x [B, C, h, w] and t a float in the sampler's own unit of time; returns x.dtype.
    `guided` makes one of a model. Wrap it to follow the progress or to record the states.
noise: [B, C, h, w], standard normal, float32 or float64: the start, and the dtype of all arithmetic of the sampler.
steps: how finely time is divided; each sampler says how often it calls the network. ValueError outside its range.
generator: for the noise that SDE and GaussianDiffusion add on the way, on the device of `noise`.
run: how a step is computed, run(network, step, x, *noise) -> x: by `steps.run`, or by something that captures it.

A sampler belongs to the network's training:

    sampler                      training           time of the network
    DPM_Solver                   DPM_Solver         1 (least noise) ... 1000
    ODE_dopri5, ODE_heun2, SDE   SiTSampler         0 (noise) ... 1 (data)
    GaussianDiffusion            GaussianDiffusion  0 (least noise) ... 999
"""

from . import dpm_solver, flow, gaussian
from .guidance import guided
from .losses import OBJECTIVES

SAMPLERS = {
    "DPM_Solver": dpm_solver.sample,
    "ODE_dopri5": flow.ode_dopri5,
    "ODE_heun2": flow.ode_heun2,
    "SDE": flow.sde,
    "GaussianDiffusion": gaussian.sample,
}

__all__ = ["OBJECTIVES", "SAMPLERS", "guided"]
