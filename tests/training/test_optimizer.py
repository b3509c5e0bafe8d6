"""Learning rate, weight decay and moving average, against the original's values where there are any."""

from dataclasses import replace

import pytest
import torch
from small_training import RECIPE
from torch import nn

from dcae_fast.models.dit import DiT, DiTConfig
from dcae_fast.models.uvit import UViT, UViTConfig
from dcae_fast.training.ema import MovingAverage
from dcae_fast.training.optimizer import build_optimizer, learning_rate

SIZES = {"in_channels": 4, "input_size": 2, "depth": 2, "hidden_size": 16, "num_heads": 2}


def test_warm_up(open_case):
    meta = open_case("pipeline", "").file_meta["lr_warmup"]
    recipe = replace(RECIPE, lr=meta["base_lr"], warmup_lr=meta["warmup_lr"], warmup_steps=meta["warmup_steps"])
    expected = meta["lr_used_at_step_1_2"]
    assert [learning_rate(recipe, step + 1) for step in range(len(expected))] == pytest.approx(expected, rel=1e-12)
    assert learning_rate(replace(recipe, warmup_steps=0), 1) == recipe.lr


def test_what_decays():
    network = UViT(UViTConfig(**SIZES))
    optimizer = build_optimizer(network, replace(RECIPE, weight_decay=0.03))
    names = {id(p): name for name, p in network.named_parameters()}
    spared = {names[id(p)] for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    assert spared == {name for name in names.values() if name.endswith("bias") or name == "norm.weight"}
    dit = DiT(DiTConfig(**SIZES))
    trained = {id(p) for group in build_optimizer(dit, RECIPE).param_groups for p in group["params"]}
    assert trained == {id(p) for name, p in dit.named_parameters() if name != "pos_embed"}


def test_moving_average(open_case, compare):
    case = open_case("pipeline", "")
    tensors = case.tensors("ema")
    network = nn.Module()
    network.weight = nn.Parameter(tensors["initial"].clone())
    average = MovingAverage(network, case.file_meta["ema"]["decay"])
    for step, (weight, expected) in enumerate(zip(tensors["weights"], tensors["averages"], strict=True), start=1):
        network.weight.data.copy_(weight)
        average.update(network, step)
        compare("pipeline", average.average["weight"], expected, 1e-6, f"step {step}")
    with average.in_place_of_weights(network):
        compare("pipeline", network.weight, tensors["averages"][-1], 1e-6)
    assert torch.equal(network.weight, tensors["weights"][-1])
