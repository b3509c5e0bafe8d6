"""The reference's small networks, and a wrapper that records how a sampler calls one."""

import torch

from dcae_fast.models.dit import DiT, DiTConfig
from dcae_fast.models.uvit import UViT, UViTConfig
from dcae_fast.sampling import guided

NETWORKS = {"UViT": (UViT, UViTConfig), "DiT": (DiT, DiTConfig)}


def build(case) -> torch.nn.Module:
    """The network of a case, in evaluation mode."""
    network, config = NETWORKS[case.file_meta["model"]]
    options = {k: v for k, v in case.file_meta["config"].items() if k != "train_scheduler"}
    model = network(config(**options))
    model.load_state_dict(case.tensors("state"))
    return model.eval()


class Recorder:
    """A network(x, t) that records the x and t of its calls."""

    def __init__(self, network):
        self.network, self.states, self.times = network, [], []

    def __call__(self, x: torch.Tensor, t: float) -> torch.Tensor:
        self.states.append(x)
        self.times.append(t)
        return self.network(x, t)


def recorder(case, scale: float) -> Recorder:
    """The guided network of a generate_* case."""
    labels, null_label = case.tensors(case.name)["labels"], case.file_meta["config"]["num_classes"]
    return Recorder(guided(build(case), labels, null_label, scale))
