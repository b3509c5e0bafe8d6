"""A training that is killed again and again, at any moment, ends with the weights of a training that is not."""

import json
import os
import subprocess
import sys
from pathlib import Path

from small_autoencoders import CPU, SHORT, recipe, run_in
from trainings import assert_equal, weights

from dcae_fast.training.autoencoder.task import train

PROGRAM = """
import os, random, signal, sys, time
import torch._dynamo  # or optimizers import it in every child
from pathlib import Path
from small_autoencoders import CPU, recipe, run_in

from dcae_fast.evaluation import networks
from dcae_fast.training.autoencoder.task import train

def absent(device):
    raise OSError("no such file")

networks.LOADERS.update(dict.fromkeys(("ssim", "lpips", "fid"), absent))
torch.set_num_threads(1)
out = Path(sys.argv[1])
run, moments, kills = run_in(out, save_steps=1, log_steps=1), random.Random(0), 0
while not (out / "model" / "README.md").exists():
    child = os.fork()
    if child == 0:
        train(recipe(out.parent), run, CPU)
        os._exit(0)
    if kills == 0:  # at the first checkpoint: a fast machine might end before any moment by the clock
        patience = time.monotonic() + 60
        while not any((out / "checkpoints").glob("step-*")) and time.monotonic() < patience:
            time.sleep(0.001)
    else:
        time.sleep(moments.uniform(0.1, 0.6) * (1 + kills / 5))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or status == 0
    kills += 1
print(kills)
"""


def test_killed(shared):
    train(recipe(shared), run_in(shared / "not-killed", save_steps=1), CPU)
    out = shared / "killed"
    command = [sys.executable, "-c", PROGRAM, str(out)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[-1]) >= 2
    assert_equal(weights(out), weights(shared / "not-killed"))
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, SHORT["steps"] + 1))
