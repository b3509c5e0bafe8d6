"""Two processes, with DDP or FSDP2, against one: the same batches, and the same weights up to rounding."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from small_autoencoders import CPU, GAN, recipe, run_in, train_until
from trainings import everything, weights

from dcae_fast.models.autoencoder import DCAE
from dcae_fast.training.autoencoder.task import AutoencoderTask, train
from dcae_fast.training.engine.loop import Training

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch.distributed is not built")
RANKS = 2
RECIPES = {
    "local-refinement": {"gan": replace(GAN, gan_start=1)},
    "decoder": {},
    "latent-adaptation": {"model": "adaptive"},
}


def chosen(folder: Path, name: str):
    return recipe(folder, name, steps=3, ema_decay=0.9, **RECIPES[name])


def trainings(rank: int, folder: Path) -> None:
    """Runs in each process: one training after another."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    torch.set_num_threads(1)
    for name in RECIPES:
        for parallel in ("ddp", "fsdp"):
            run = run_in(folder / f"{name}-{parallel}", parallel=parallel, sample_steps=3, eval_steps=3)
            train(chosen(folder, name), run, CPU)
    run = run_in(folder / "decoder-accumulated", accumulate=2, checkpoint_activations=True)
    train(chosen(folder, "decoder"), run, CPU)
    train(chosen(folder, "decoder"), run_in(folder / "decoder-one-then-two"), CPU)
    with_norms = replace(chosen(folder, "local-refinement"), gan=replace(GAN, gan_start=1, discriminator_norm="batch"))
    train(replace(with_norms, source=str(folder / "batch-norm"), train=("decoder",)), run_in(folder / "norms"), CPU)
    dist.barrier()
    os._exit(0)  # destroying the gloo group of DDP may wait forever for a thread that needs the GIL


def on_four_ranks(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/of-four", rank=rank, world_size=4)
    torch.set_num_threads(1)
    train(chosen(folder, "decoder"), run_in(folder / "decoder-four"), CPU)
    dist.barrier()
    os._exit(0)


@pytest.fixture(scope="module")
def folder(shared) -> Path:
    """The folder `shared` with the trainings of two processes, and of one process."""
    train_until(2, chosen(shared, "decoder"), run_in(shared / "decoder-one-then-two"))
    train_until(3, chosen(shared, "decoder"), run_in(shared / "decoder-whole"))
    torch.multiprocessing.start_processes(trainings, (shared,), RANKS, start_method="fork")
    torch.multiprocessing.start_processes(on_four_ranks, (shared,), 4, start_method="fork")
    for name in RECIPES:
        in_one_process(shared, name, name, shards=RANKS)
    in_one_process(shared, "decoder", "decoder-by-four", shards=4)
    return shared


def in_one_process(folder: Path, name: str, out: str, shards: int) -> None:
    """Trains on the batches that so many ranks have, and saves everything as <out>-one.pt."""
    training = Training(AutoencoderTask(chosen(folder, name), run_in(folder / f"{out}-one"), CPU))
    training.shards = shards
    training.run_all()
    training.log.close()
    torch.save(everything(training.state), folder / f"{out}-one.pt")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", RECIPES)
def test_as_one_process(folder, compare, name, parallel):
    check(folder, compare, f"{name}-{parallel}", name)


def test_accumulated_on_two_ranks(folder, compare):
    check(folder, compare, "decoder-accumulated", "decoder")


def test_four_ranks(folder, compare):
    """With a picture each."""
    check(folder, compare, "decoder-four", "decoder-by-four")


def test_resuming_with_another_number_of_ranks(folder, compare):
    expected = load_file(folder / "decoder-whole" / "checkpoints" / "step-000000003" / "ema" / "model.safetensors")
    for key, value in weights(folder / "decoder-one-then-two").items():
        compare("eager", value, expected[key], 2e-3, key)


def test_batch_norms_on_two_ranks(folder):
    """Of the decoder and the discriminator. Each rank has its own statistics, so that one process differs."""
    before = DCAE.from_pretrained(folder / "batch-norm").state_dict()
    for key, value in weights(folder / "norms").items():
        assert value.isfinite().all() and torch.equal(value, before[key]) == key.startswith("encoder."), key


def check(folder, compare, run: str, name: str) -> None:
    expected, got = torch.load(folder / f"{name}-one.pt"), weights(folder / run)
    assert got
    for key, value in got.items():
        compare("eager", value, expected.get(f"average.{key}", expected[f"autoencoder.{key}"]), 2e-3, key)
    assert (folder / run / "model" / "README.md").is_file()
