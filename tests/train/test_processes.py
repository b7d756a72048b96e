"""Two processes give the result of one."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_runs import assert_close_metrics, largest_difference, weights

from vimtune.train import train

REPOSITORY = Path(__file__).resolve().parents[2]

LAUNCHED = """
import sys
from vimtune.recipe import Recipe
from vimtune.train import train

train(Recipe(**eval(sys.argv[1])))
"""


@pytest.fixture
def launch(tmp_path):
    """Run a recipe with torchrun on two processes of this machine."""
    script = tmp_path / "launched.py"
    script.write_text(LAUNCHED)

    def run(recipe) -> subprocess.CompletedProcess[str]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
        command += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
        command += [str(script), repr(recipe.to_dict())]
        return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=200)

    return run


@pytest.mark.usefixtures("no_pictures")
def test_two_processes_give_the_result_of_one(tiny, launch):
    # The last batch of each epoch has one image: the first process's share of it is empty.
    one = tiny("one", epochs=2, grad_accum=2, ema=0.9)
    two = replace(one, output_dir=str(Path(one.output_dir).parent / "two"))
    result = launch(two)
    assert result.returncode == 0, result.stderr
    report = train(one)
    assert largest_difference(weights(one.output_dir), weights(two.output_dir)) < 1e-5
    stored = json.loads(Path(two.output_dir, "report.json").read_text())
    assert stored["processes"] == 2 and report.processes == 1
    for name in ("top1", "top5", "num_images", "per_class", "best_epoch", "steps"):
        assert stored[name] == getattr(report, name)
    assert stored["loss"] == pytest.approx(report.loss, abs=1e-5)
    # One process writes and prints.
    assert_close_metrics(one.output_dir, two.output_dir, abs=1e-4)
    assert result.stdout.count("epoch 1/2") == 1


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.usefixtures("no_pictures")
def test_two_gpus_with_replayed_batches_give_the_result_of_one(tiny, launch):
    settings = {"device": "cuda", "backend": "auto", "cuda_graph": "on", "transforms": "torchvision"}
    one = tiny("one", epochs=4, grad_accum=2, num_workers=2, **settings)
    two = replace(one, output_dir=str(Path(one.output_dir).parent / "two"))
    result = launch(two)
    assert result.returncode == 0, result.stderr
    train(one)
    assert json.loads(Path(two.output_dir, "report.json").read_text())["cuda_graph"]
    assert largest_difference(weights(one.output_dir), weights(two.output_dir)) < 1e-4
