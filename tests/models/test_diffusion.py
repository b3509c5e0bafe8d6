"""UViT, USiT, DiT and SiT against the original implementation: tiny networks, and the shapes of all released ones."""

import json
import math
from dataclasses import replace

import pytest
import torch

from dcae_fast.models import diffusion_zoo, zoo
from dcae_fast.models.dit import DiT, DiTConfig, position_table
from dcae_fast.models.transformer import LabelEmbedder, sinusoidal_embedding
from dcae_fast.models.uvit import UViT, UViTConfig

FORWARD, LOSS, GRADIENT, TABLE = 2e-6, 2e-6, 2e-5, 1e-7
NETWORKS = {"UViT": (UViT, UViTConfig), "DiT": (DiT, DiTConfig)}
PIPELINE = {"train_scheduler", "eval_scheduler", "num_inference_steps"}  # of a fixture's config, not the network's
SIZES = {"in_channels": 8, "input_size": 4, "depth": 2, "hidden_size": 32, "num_heads": 2, "num_classes": 10}


def build(case, **overrides) -> UViT | DiT:
    network, config = NETWORKS[case.file_meta["model"]]
    given = {key: value for key, value in case.file_meta["config"].items() if key not in PIPELINE}
    if given.pop("adaptive_channel", False):
        given["adaptive"] = True
    model = network(config(**given | overrides))
    model.load_state_dict(case.tensors("state"))
    return model.eval()


def random_batch(model: UViT | DiT, channels: int = 8, batch: int = 3) -> tuple[torch.Tensor, ...]:
    size, classes = model.config.input_size, model.config.num_classes
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, channels, size, size, generator=generator)
    return x, torch.rand(batch, generator=generator), torch.randint(classes + 1, (batch,), generator=generator)


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Without zero parameters, with which DiT's output would not depend on its input."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


@pytest.fixture(params=[UViT, DiT], ids=["uvit", "dit"])
def small(request) -> UViT | DiT:
    config = {UViT: UViTConfig, DiT: DiTConfig}[request.param]
    return randomised(request.param(config(**SIZES))).eval()


# The original's outputs and gradients.


@pytest.mark.parametrize("which", ["uvit", "usit", "dit", "sit", "uvit_patch2", "dit_patch2", "uvit_adaptive"])
@torch.no_grad()
def test_forward(which, open_case, compare):
    case = open_case(f"diffusion_{which}", "forward")
    model, tensors = build(case), case.tensors("forward")
    assert sum(parameter.numel() for parameter in model.parameters()) == case.file_meta["parameters"]
    out = model(tensors["x"], tensors["t"], tensors["y"])
    if which in ("sit", "usit"):  # the fixture also has times far beyond 1, where the last bit of a frequency shows
        compare(case.file, out, tensors["out"], 5 * FORWARD, "out at any time")
        inside = tensors["t"] <= 1
        compare(case.file, out[inside], tensors["out"][inside], FORWARD, "out at times from 0 to 1")
    else:
        compare(case.file, out, tensors["out"], FORWARD, "out")


@torch.no_grad()
def test_forward_of_partial_latents(open_case, compare):
    case = open_case("diffusion_uvit_adaptive", "partial")
    model, tensors = build(case), case.tensors("partial")
    out = model(tensors["x"], tensors["t"], tensors["y"])
    compare(case.file, out, tensors["out"], FORWARD, "out, 8 of 16 channels")


@pytest.mark.cases("diffusion_*", "train")
@torch.no_grad()
def test_training_outputs(case, compare, monkeypatch):
    tensors, model = case.tensors("train"), build(case).train()
    draws = torch.where(tensors["dropped"], 0.49, 0.5)
    monkeypatch.setattr("torch.rand", lambda shape, device: draws)
    out = model(tensors["x_t"], tensors["t"], tensors["y"])
    compare(case.file, out, tensors["model_out"], FORWARD, "labels dropped by the network")
    monkeypatch.undo()
    out = model.eval()(tensors["x_t"], tensors["t"], tensors["labels_used"])
    compare(case.file, out, tensors["model_out"], FORWARD, "labels dropped before")


@pytest.mark.cases("diffusion_[us]*it", "train")
def test_training_gradients(case, compare, compare_gradients):
    """Gradients of the mean square losses: all except DiT's, which has a second term for the variance."""
    tensors = case.tensors("train")
    target = tensors[{"DPM_Solver": "noise", "SiTSampler": "target"}[case.meta["train_scheduler"]]]
    model = build(case, class_dropout_prob=0.0).train()
    out = model(tensors["x_t"], tensors["t"], tensors["labels_used"])
    loss = (out - target).square().mean()
    compare(case.file, loss, torch.tensor(case.meta["loss"]), LOSS, "loss")
    loss.backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    compare_gradients(case, {name: parameter.grad for name, parameter in trained.items()}, GRADIENT)


def test_time_embedding(open_case):
    """Another exp() may round the frequency ω <= 1 differently: the angle t · ω differs by at most t · 2^-23."""
    tables = open_case("diffusion_tables", "").tensors("embedding")
    t = tables.pop("t")
    for dim in (64, 256, 1152):
        error = (sinusoidal_embedding(t, dim) - tables[f"dim{dim}"]).abs()
        assert (error <= 2**-23 * (1 + t[:, None])).all()


def test_position_table(open_case, compare):
    tables = open_case("diffusion_tables", "").tensors("dit_pos_embed")
    for dim, side in ((64, 4), (96, 3)):
        expected = tables[f"dim{dim}_grid{side}"]
        compare("diffusion_tables", position_table(dim, side)[0], expected, TABLE, f"positions, {dim}")


# What any network does.


def test_labels_are_dropped_in_training_mode_alone():
    torch.manual_seed(0)
    embedder = LabelEmbedder(num_classes=10, hidden_size=4, dropout_prob=0.1)
    y = torch.arange(10).repeat(1000)
    expected = embedder.embedding_table(y)
    dropped = (embedder(y) != expected).any(dim=1)
    assert 900 < dropped.sum() < 1100  # 3.3 standard deviations
    assert torch.equal(embedder.eval()(y), expected)
    embedder = LabelEmbedder(num_classes=10, hidden_size=4, dropout_prob=1.0)
    assert torch.equal(embedder(y), embedder.embedding_table.weight[10].expand(len(y), 4))


def test_initial_weights():
    torch.manual_seed(0)
    sizes = SIZES | {"hidden_size": 64, "num_classes": 1000}
    uvit, dit = UViT(UViTConfig(**sizes)), DiT(DiTConfig(**sizes))
    block = dit.blocks[0]
    xavier = {layer: math.sqrt(2 / (64 + out)) for layer, out in ((block.attn.qkv, 192), (block.mlp.fc1, 256))}
    expected = {
        uvit.pos_embed: 0.02,
        uvit.in_blocks[0].attn.qkv.weight: 0.02,
        uvit.out_blocks[0].skip_linear.weight: 0.02,
        uvit.decoder_pred.weight: 0.02,
        uvit.label_emb.embedding_table.weight: 1,
        dit.y_embedder.embedding_table.weight: 0.02,
        dit.t_embedder.mlp[0].weight: 0.02,
        dit.t_embedder.mlp[2].weight: 0.02,
        dit.x_embedder.proj.weight: math.sqrt(2 / (8 + 64)),
        **{layer.weight: std for layer, std in xavier.items()},
    }
    for parameter, std in expected.items():
        assert parameter.std().item() == pytest.approx(std, rel=0.1)
    zeros = [parameter for name, parameter in dit.named_parameters() if name.endswith(".bias") or "adaLN" in name]
    zeros += [
        parameter for name, parameter in uvit.named_parameters() if name.endswith(".bias") and "patch" not in name
    ]
    assert not any(parameter.any() for parameter in [*zeros, dit.final_layer.linear.weight])
    assert uvit.patch_embed.proj.bias.any()


def test_epsilons(small):
    """Reads the epsilons: a wrong one would change the outputs by only 1e-6."""
    norms = [module for module in small.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert {norm.eps for norm in norms} == {1e-6 if isinstance(small, DiT) else 1e-5}


@pytest.mark.parametrize("batch", [0, 1, 3])
@torch.no_grad()
def test_batches(small, batch):
    x, t, y = random_batch(small, batch=batch)
    out = small(x, t, y)
    assert out.shape == (batch, 16 if isinstance(small, DiT) else 8, 4, 4)
    for i in range(batch):
        torch.testing.assert_close(small(x[i : i + 1], t[i : i + 1], y[i : i + 1]), out[i : i + 1])


@torch.no_grad()
def test_types_of_times_and_labels(small):
    x, t, y = random_batch(small)
    t = torch.tensor([0, 500, 1000])
    out = small(x, t.float(), y)
    for other in (t, t.half(), t.double()):
        torch.testing.assert_close(small(x, other, y.int()), out)


@torch.no_grad()
def test_half_precision(small):
    x, t, y = random_batch(small)
    out = small(x, t, y)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = small(x, t, y)
    half = small.bfloat16()(x.bfloat16(), t, y)
    for got in (autocast, half):
        assert got.dtype == torch.bfloat16
        assert (got - out).norm() < 1e-2 * out.norm()


def test_autocast_gradients(small):
    x, t, y = random_batch(small)
    with torch.autocast("cpu", torch.bfloat16):
        loss = small.train()(x, t, y).float().square().mean()
    loss.backward()
    for name, parameter in small.named_parameters():
        assert parameter.requires_grad == (name != "pos_embed" or isinstance(small, UViT))
        assert not parameter.requires_grad or parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all()


def test_compiles_in_one_graph(small):
    x, t, y = random_batch(small)
    torch.testing.assert_close(torch.compile(small, fullgraph=True, backend="aot_eager")(x, t, y), small(x, t, y))


@torch.no_grad()
def test_partial_latents():
    """The result has the input's channels, and equals that for a latent whose other channels are zero."""
    model = randomised(UViT(UViTConfig(**SIZES, patch_size=2, adaptive=True))).eval()
    x, t, y = random_batch(model, channels=5)
    whole = model(torch.cat([x, torch.zeros(3, 3, 4, 4)], dim=1), t, y)
    assert whole.shape == (3, 8, 4, 4)
    narrow = UViT(replace(model.config, in_channels=5, adaptive=False)).eval()
    state = model.state_dict()
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"][:, :5]
    for name in ("decoder_pred.weight", "decoder_pred.bias"):
        state[name] = state[name][: 5 * 2**2]
    narrow.load_state_dict(state)
    torch.testing.assert_close(model(x, t, y), narrow(x, t, y))


def batch_with(**changes) -> dict[str, torch.Tensor]:
    return {"x": torch.zeros(2, 8, 4, 4), "t": torch.zeros(2), "y": torch.zeros(2, dtype=torch.int64)} | changes


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"x": torch.zeros(2, 8, 4, 4, dtype=torch.uint8)}, TypeError, "x is torch.uint8"),
        ({"x": [[0.0]]}, TypeError, "x is of type list; expected a tensor"),
        ({"t": 3.0}, TypeError, "t is of type float; expected a tensor"),
        ({"y": [1, 2]}, TypeError, "y is of type list; expected a tensor"),
        ({"x": torch.zeros(8, 4, 4)}, ValueError, r"x has shape \[8, 4, 4\]; expected \[B, 8, 4, 4\]"),
        ({"x": torch.zeros(2, 7, 4, 4)}, ValueError, r"expected \[B, 8, 4, 4\]"),
        ({"x": torch.zeros(2, 8, 4, 8)}, ValueError, r"expected \[B, 8, 4, 4\]"),
        ({"t": torch.zeros(())}, ValueError, r"t has shape \[\]; expected \[2\]"),
        ({"t": torch.zeros(1)}, ValueError, r"t has shape \[1\]; expected \[2\], one for each latent of x"),
        ({"y": torch.zeros(2, 1).long()}, ValueError, r"y has shape \[2, 1\]"),
        ({"y": torch.zeros(2)}, TypeError, "y is torch.float32; expected integers from 0 to 10, which means no class"),
        ({"y": torch.tensor([0, 11])}, IndexError, "out of range"),
        ({"y": torch.tensor([-1, 0])}, IndexError, "out of range"),
    ],
)
def test_inputs_that_do_not_fit(small, changes, error, message):
    with pytest.raises(error, match=message):
        small(**batch_with(**changes))


def test_partial_latents_out_of_range():
    model = UViT(UViTConfig(**SIZES, adaptive=True))
    for channels in (0, 9):
        with pytest.raises(ValueError, match=r"expected \[B, 1 to 8, 4, 4\]"):
            model(**batch_with(x=torch.zeros(2, channels, 4, 4)))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"patch_size": 3}, "input_size=4; expected a multiple of patch_size=3"),
        ({"num_heads": 5}, "hidden_size=32; expected a multiple of num_heads=5"),
        ({"hidden_size": 6}, "hidden_size=6; expected a multiple of 4"),
        ({"class_dropout_prob": 10}, "class_dropout_prob=10; expected a number from 0 to 1"),
        ({"depth": 3}, "depth=3; expected an even number"),
    ],
)
def test_configurations_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        UViTConfig(**SIZES | changes)


# The released models.


@pytest.fixture(params=diffusion_zoo.DIFFUSION_MODELS)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def registry(reference) -> dict:
    return json.loads((reference / "diffusion_models.json").read_text())


def test_parameters_and_state_dicts(name, registry):
    with torch.device("meta"):
        model = diffusion_zoo.diffusion_config(name).build()
    entry, parameters = registry[name], list(model.parameters())
    assert sum(parameter.numel() for parameter in parameters) == entry["parameters"]
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    assert trainable == entry["trainable_parameters"]
    manifest = entry["state_dict"]
    manifest = registry[manifest["same_as"]]["state_dict"] if "same_as" in manifest else manifest
    assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == manifest


def test_facts(name, registry):
    config, entry = diffusion_zoo.diffusion_config(name), registry[name]
    for key in ("autoencoder", "scaling_factor", "train_scheduler", "eval_scheduler", "num_inference_steps"):
        assert getattr(config, key) == entry[key]
    network = config.network
    for key in (
        *("in_channels", "input_size", "patch_size", "depth", "hidden_size"),
        *("num_heads", "num_classes", "class_dropout_prob", "tokens"),
    ):
        assert getattr(network, key) == entry[key]
    assert getattr(network, "learn_sigma", None) == entry["learn_sigma"]
    assert getattr(network, "adaptive", False) == entry["config"]["adaptive_channel"]
    assert type(network) is {"uvit": UViTConfig, "dit": DiTConfig}[entry["kind"]]


def test_all_released_models_are_known(registry):
    assert diffusion_zoo.DIFFUSION_MODELS.keys() == registry.keys()
    assert {config.autoencoder for config in diffusion_zoo.DIFFUSION_MODELS.values()} <= zoo.AUTOENCODERS.keys()


def test_unknown_name():
    with pytest.raises(ValueError, match="diffusion model 'dc-ae-f32c32-in-1.0-uvit-x-in-512px'; did you mean 'dc-ae-"):
        diffusion_zoo.diffusion_config("dc-ae-f32c32-in-1.0-uvit-x-in-512px")
