"""Learning rate, weight decay and moving average, against the original's values where there are any."""

import math

import pytest
import torch
from torch import nn

from dcae_fast.models.dit import DiT, DiTConfig
from dcae_fast.models.uvit import UViT, UViTConfig
from dcae_fast.training.engine.ema import MovingAverage
from dcae_fast.training.engine.optimizer import build_optimizer, learning_rate

SIZES = {"in_channels": 4, "input_size": 2, "depth": 2, "hidden_size": 16, "num_heads": 2}


def test_warm_up(open_case):
    meta = open_case("pipeline", "").file_meta["lr_warmup"]
    warm_up = {"lr": meta["base_lr"], "warmup_steps": meta["warmup_steps"], "warmup_lr": meta["warmup_lr"]}
    expected = meta["lr_used_at_step_1_2"]
    rates = [learning_rate(step + 1, **warm_up) for step in range(len(expected))]
    assert rates == pytest.approx(expected, rel=1e-12)
    assert learning_rate(1, **warm_up | {"warmup_steps": 0}) == meta["base_lr"]


def test_cosine_decay():
    """From lr at the last step of the warm-up to 0 at the last step of all."""
    rates = [learning_rate(step, 2.0, 4, 1.0, ends=12) for step in range(1, 13)]
    assert rates[:4] == [1.25, 1.5, 1.75, 2.0]
    expected = [1 + math.cos(math.pi * step / 8) for step in range(1, 9)]
    assert rates[4:] == pytest.approx(expected, abs=1e-12) and rates[7] == pytest.approx(1) and rates[-1] == 0
    assert learning_rate(4, 2.0, 4, 1.0, ends=4) == 2.0
    assert learning_rate(3, 2.0, 0, 0.0, ends=6) == pytest.approx(1)


def test_what_decays():
    network = UViT(UViTConfig(**SIZES))
    optimizer = build_optimizer(network, 1e-3, (0.9, 0.99), weight_decay=0.03)
    names = {id(p): name for name, p in network.named_parameters()}
    spared = {names[id(p)] for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    assert spared == {name for name in names.values() if name.endswith("bias") or name == "norm.weight"}
    dit = DiT(DiTConfig(**SIZES))
    optimizer = build_optimizer(dit, 1e-3, (0.9, 0.99), weight_decay=0.03)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
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
