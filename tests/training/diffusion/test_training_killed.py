"""A training that is killed again and again, at any moment, ends with the weights of a training that is not."""

import json
import os
import subprocess
import sys
from pathlib import Path

from small_training import RECIPE
from trainings import assert_equal, weights

PROGRAM = """
import os, random, signal, sys, time
import torch._dynamo  # or optimizers import it in every child
from pathlib import Path
from small_training import CPU, RECIPE, run_in

from dcae_fast.training.diffusion.task import train

torch.set_num_threads(1)
run, moments, kills = run_in(Path(sys.argv[1]), save_steps=1, log_steps=1), random.Random(0), 0
while not (run.out / "model" / "config.json").exists():
    child = os.fork()
    if not child:
        train(RECIPE, run, CPU)
        os._exit(0)
    if kills == 0:  # at the first checkpoint: a fast machine might end before any moment by the clock
        patience = time.monotonic() + 60
        while not any((run.out / "checkpoints").glob("step-*")) and time.monotonic() < patience:
            time.sleep(0.001)
    else:
        time.sleep(moments.uniform(0.02, 0.2) * (1 + kills / 10))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    kills += 1
print(kills)
"""


def test_killed(shared):
    out = shared / "killed"
    command = [sys.executable, "-c", PROGRAM, str(out)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[-1]) >= 2
    assert_equal(weights(out), weights(shared / "whole"))
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, RECIPE.steps + 1))
