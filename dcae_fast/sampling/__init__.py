"""Samplers of latents, and the losses that train networks for them. The names are the original's.

    network = guided(model, labels, null_label=1000, scale=1.5)
    z = SAMPLERS["DPM_Solver"](network, torch.randn(len(labels), 128, 8, 8))

Every sampler is a function sample(network, noise, steps, generator, run) -> latents:

network: called as network(x, t), with x [B, C, h, w] and the float t in the sampler's unit of time; returns x.dtype.
    `guided` makes such a function from a model. Wrap the function to show progress or to record states.
noise: [B, C, h, w], standard normal, float32 or float64: the initial state. The sampler computes in this dtype.
steps: number of steps; each sampler documents how often it calls the network. ValueError outside the sampler's range.
generator: for the noise that SDE and GaussianDiffusion add in each step, on the device of `noise`.
run: computes a step, run(network, step, x, *noise) -> x: `steps.run`, or a function that captures and replays steps.

A sampler fits networks that were trained with the objective in the second column:

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
