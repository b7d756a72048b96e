"""A model that is shared out among the processes trains as one that lies whole in a single one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import timm
import torch
import two_ranks
from tiny_runs import assert_close_metrics, largest_difference
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from two_ranks import run_two

from vimtune.adapters.slots import at_rest, base_parameters
from vimtune.models.vim import Flow
from vimtune.recipe import load_recipe
from vimtune.recipe.components import OptimisationSettings
from vimtune.runtime.distributed import Processes
from vimtune.tensor_file import read_tensors
from vimtune.training import graph, sharding, train
from vimtune.training.sharding import Sharded, blocks_of, build_placement

SETTINGS = {"grad_accum": 2, "ema": 0.9, "clip_grad": 0.5}
"""With 25 training images the last batch of an epoch has one image: a process has no share of it."""
FULL = {"peft": "full", "rank": None}


def state(folder: str | Path) -> dict[str, Tensor]:
    """All tensors of a run's state."""
    return read_tensors(Path(folder) / "checkpoint.safetensors")


def forms(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def assert_same_run(one: str, other: str) -> None:
    """Same files with the same values, and the same records."""
    assert forms(state(one)) == forms(state(other))
    assert largest_difference(state(one), state(other)) < 1e-5
    saved, also = (read_tensors(Path(folder) / "adapter.safetensors") for folder in (one, other))
    assert forms(saved) == forms(also) and largest_difference(saved, also) < 1e-5
    assert_close_metrics(one, other, abs=1e-4)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.processes
def test_sharded_runs_and_whole_ones_give_the_same_and_continue_each_other(tiny):
    """Runs of one process with the whole model, and of two that share it; at last one that diverges."""

    def folder(name: str) -> str:
        return str(tiny(name).run.output_dir)

    whole, adapters = tiny("whole", epochs=1, **SETTINGS, **FULL), tiny("adapters", epochs=1, **SETTINGS)
    adapters = adapters.replace(peft="prodial+bitfit")
    for recipe in (whole, adapters):
        train(recipe)
    for copy in ("whole after an epoch", "sharded after an epoch"):
        shutil.copytree(folder("whole"), folder(copy))
    answers = run_two(
        whole.replace(output_dir=folder("sharded"), shard=True),
        adapters.replace(output_dir=folder("sharded adapters"), shard=True),
        load_recipe(None, {"resume": folder("sharded after an epoch"), "epochs": 2, "shard": True}),
        tiny("diverged", shard=True, lr=1e30, clip_grad=0),
    )
    for answer in answers:
        assert answer.startswith("NonFiniteError: non-finite loss in epoch 1, step 2")
        assert "It first arises in the output of layers.0.mixer.in_proj (Linear)" in answer
    assert_same_run(folder("whole after an epoch"), folder("sharded"))
    assert_same_run(folder("adapters"), folder("sharded adapters"))

    train(load_recipe(None, {"resume": folder("whole"), "epochs": 2}))
    assert_same_run(folder("whole"), folder("sharded after an epoch"))
    report = train(load_recipe(None, {"resume": folder("sharded"), "epochs": 2, "shard": False}))
    assert_same_run(folder("whole"), folder("sharded"))
    assert any(warning.startswith("resumed with processes = 1 (was 2)") for warning in report.warnings)


@pytest.mark.processes
def test_a_killed_process_ends_the_other_which_names_the_last_state(tiny, no_pictures):
    left, killed = run_two(tiny(shard=True), sabotage=two_ranks.die_in_a_pass)
    assert killed is None
    assert left.startswith("PeerLostError: another process of the run has ended")
    assert "went a part of the model; continue from the last saved state with:\n  torchrun" in left


def test_what_cannot_be_sharded_is_refused(tiny, monkeypatch):
    with pytest.raises(ValueError, match="shard = true needs several processes and there is one") as error:
        train(tiny(shard=True))
    assert "--no-shard" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="shard = true is not possible on mps"):
        build_placement(OptimisationSettings(shard=True), Processes(0, 2, torch.device("mps")))
    with pytest.raises(ValueError, match=r"cuda_graph = 'on' is not possible: .* share the model"):
        train(tiny(shard=True, cuda_graph="on"))
    assert graph.refusals(OptimisationSettings(shard=True), torch.device("cuda", 0)) == [
        "the processes share the model (shard)"
    ]
    for method, options in (("affix", {"hidden": 4}), ("svp", {"width": 4})):
        vim = timm.create_model("test_vim", peft=method, peft_kwargs=options)
        with pytest.raises(ValueError, match=r"shard = true does not go with .* of several blocks"):
            Sharded(Processes()).place(vim)
    monkeypatch.setattr(sharding, "settles", lambda model: True)
    with pytest.raises(ValueError, match="chooses from data before training"):
        Sharded(Processes()).place(nn.Linear(2, 2))


def test_blocks_are_what_a_model_lists():
    vim = timm.create_model("test_vim", peft="lora")
    assert blocks_of(vim) == list(vim.layers)
    vit = timm.create_model("test_vit")
    assert blocks_of(vit) == list(vit.blocks)
    assert blocks_of(nn.Linear(2, 2)) == []


def test_all_blocks_get_one_and_the_same_flow():
    """FSDP takes the arguments of a block apart as pytrees and gives it what it puts together again."""
    flow = Flow()
    leaves, form = tree_flatten((torch.ones(1), flow))
    assert tree_unflatten(leaves, form)[1] is flow


def test_at_rest_parameters_are_the_frozen_ones():
    """FSDP looks parameters up by their names."""
    model = timm.create_model("test_vim", peft="full")
    frozen = dict(base_parameters(model))

    def found(name: str) -> object:
        place, _, leaf = name.rpartition(".")
        return getattr(model.get_submodule(place), leaf)

    with at_rest(model):
        assert all(found(name) is parameter for name, parameter in frozen.items())
    assert not any(found(name) is parameter for name, parameter in frozen.items())


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_two_gpus_sharded_give_the_result_of_one(tiny, launch, amp):
    settings = {"device": "cuda", "backend": "auto", "transforms": "torchvision", "amp": amp, "epochs": 4}
    one = tiny("one", num_workers=2, **settings, **SETTINGS, **FULL)
    two = one.replace(output_dir=f"{one.run.output_dir} sharded", shard=True)
    result = launch(two)
    assert result.returncode == 0, result.stderr
    train(one)
    difference = largest_difference(state(one.run.output_dir), state(two.run.output_dir))
    assert difference < (1e-4 if amp == "none" else 3e-2)
