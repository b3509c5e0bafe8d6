"""LPIPS of the training of autoencoders: bias and ReLU in one pass, and the distance of a stage in one."""

import torch
from torch import nn

from dcae_fast import ops

from ..fusion import conv_norm_act
from ..module import FastModule
from ..registry import register


class LPIPS(FastModule):
    operators = ("bias_act", "conv2d", "feature_distance")
    attributes = ("features", "heads", "ends")

    def fast_forward(self, *pictures: torch.Tensor) -> torch.Tensor:
        return super().eager(*pictures)

    def stages(self, x: torch.Tensor) -> list[torch.Tensor]:
        x, stages, conv = (x - self.shift) / self.scale, [], None
        for number, layer in enumerate(self.features, 1):
            if type(layer) is nn.Conv2d:
                conv = layer
                continue
            x = layer(x) if type(layer) is nn.MaxPool2d else conv_norm_act(conv, None, "relu", x)
            if number in self.ends:
                stages.append(x)
        return stages

    distance = staticmethod(ops.feature_distance)


register("training.autoencoder.losses", {"LPIPS": LPIPS})
