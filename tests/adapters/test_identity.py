"""The identity of base weights: what was loaded or drawn, and never claimed for anything else."""

from __future__ import annotations

import copy
import hashlib
import io
import json

import pytest
import timm
import torch
from method_cases import disturb
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode

import vimtune
from vimtune import cli
from vimtune.adapters import AdapterFileError, base_identity, base_parameters, has_base
from vimtune.commands.predict import load_predictor
from vimtune.models import VisionMamba, checkpoint, checkpoint_filter_fn, create_listed_model, vim
from vimtune.tasks.origin import check_replaced

SMALL = {"num_classes": 5, "depth": 2}


def create(seed: int = 0, **options) -> VisionMamba:
    torch.manual_seed(seed)
    return timm.create_model("test_vim", **{**SMALL, **options}).eval()


def adapted(model: VisionMamba) -> VisionMamba:
    return vimtune.inject(model, "lora", rank=2)


def identity(model: VisionMamba):
    """Identity of a plain model's weights, the model left as it is."""
    vimtune.inject(model, "lora", rank=2)
    try:
        return base_identity(model)
    finally:
        vimtune.delete_adapter(model, "default")


@pytest.fixture
def weights(tmp_path):
    """A file of base weights."""
    path = tmp_path / "base.safetensors"
    save_file(create(seed=9).state_dict(), path)
    return path


@pytest.fixture
def saved(tmp_path, weights):
    """An adapter trained on these weights."""
    model = adapted(vimtune.load_checkpoint(create(1), weights))
    disturb(model, 1)
    path = tmp_path / "adapter.safetensors"
    vimtune.save_adapter(model, path)
    return path


@pytest.fixture
def another_machine(monkeypatch):
    """Call it, and drawing and resizing give other last bits, as with another instruction set."""

    def move() -> None:
        def draw(tensor, **options):
            trunc_normal(tensor, **options)
            with torch.no_grad():
                return tensor.mul_(1 + 2**-23)

        trunc_normal, resize = vim.trunc_normal_, checkpoint.resize_pos_embed
        monkeypatch.setattr(vim, "trunc_normal_", draw)
        monkeypatch.setattr(checkpoint, "resize_pos_embed", lambda *given: resize(*given) * (1 + 2**-23))

    return move


# --- the same weights are recognised

SAME = {
    "again": lambda path: vimtune.load_checkpoint(create(2), path),
    "other image size": lambda path: vimtune.load_checkpoint(create(2, img_size=48), path),
    "not square": lambda path: vimtune.load_checkpoint(create(2, img_size=(16, 72)), path),
    "other number of classes": lambda path: vimtune.load_checkpoint(create(2, num_classes=3), path),
    "created in bf16": lambda path: vimtune.load_checkpoint(create(2, dtype=torch.bfloat16), path),
    "cast to bf16": lambda path: vimtune.load_checkpoint(create(2), path).to(torch.bfloat16),
    "cast to fp16 and back": lambda path: vimtune.load_checkpoint(create(2), path).half().float(),
    "cast to fp64": lambda path: vimtune.load_checkpoint(create(2), path).double(),
    "resized and cast": lambda path: vimtune.load_checkpoint(create(2, img_size=48), path).half(),
    "cast inside a wrapper": lambda path: wrapped_cast(vimtune.load_checkpoint(create(2), path)),
    "load_state_dict": lambda path: loaded(create(2), load_file(path)),
    "load_state_dict into bf16": lambda path: loaded(create(2).bfloat16(), load_file(path)),
    "assign": lambda path: loaded(create(2), load_file(path), assign=True),
    "meta, then assign": lambda path: loaded(on_meta(), load_file(path), assign=True),
    "inside a wrapper": lambda path: wrapped_loading(create(2), path),
    "timm, other image size": lambda path: by_timm(path, img_size=48),
    "timm, bf16": lambda path: by_timm(path, dtype=torch.bfloat16),
    "deepcopy": lambda path: copy.deepcopy(vimtune.load_checkpoint(create(2, img_size=48), path)),
    "pickled": lambda path: pickled(vimtune.load_checkpoint(create(2, img_size=48), path)),
}


def loaded(model, state, **options):
    model.load_state_dict(state, **options)
    return model


def on_meta():
    with torch.device("meta"):
        return create()


def wrapped_cast(model):
    torch.nn.Sequential(model).half()
    return model


def wrapped_loading(model, path):
    state = {f"0.{name}": value for name, value in load_file(path).items()}
    torch.nn.Sequential(model).load_state_dict(state)
    return model


def by_timm(path, **options):
    overlay = {"file": str(path), "num_classes": 5}
    return timm.create_model("test_vim", pretrained=True, pretrained_cfg_overlay=overlay, **SMALL, **options)


def pickled(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("how", SAME)
def test_loaded_weights_are_recognised(weights, saved, how):
    vimtune.load_adapter(SAME[how](weights), saved)


@pytest.mark.parametrize("how", ["again", "other image size", "created in bf16", "timm, other image size"])
def test_an_adapter_trained_in_another_form_fits_the_plain_one(tmp_path, weights, how):
    model = adapted(SAME[how](weights))
    vimtune.save_adapter(model, tmp_path / "other.safetensors")
    vimtune.load_adapter(vimtune.load_checkpoint(create(3), weights), tmp_path / "other.safetensors")


def test_drawn_weights_are_recognised_by_the_seed(tmp_path):
    model = adapted(create(4, img_size=48))
    found = base_identity(model)
    assert identity(create(4, img_size=48)) == found
    assert identity(create(4, img_size=48).bfloat16()).origin == found.origin
    assert identity(copy.deepcopy(create(4, img_size=48)).double()).origin == found.origin
    assert identity(create(4, img_size=48, drop_path_rate=0.1, global_pool="avg")).origin == found.origin
    for other in (create(5, img_size=48), create(4), create(4, num_classes=6, img_size=48)):
        assert not has_base(adapted(other), found.bits, found.origin)


def test_asking_for_the_identity_of_drawn_weights_draws_nothing_from_the_users_generator():
    model = adapted(create(4))
    before = torch.get_rng_state()
    base_identity(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_rule_of_drawing_is_the_one_that_its_number_stands_for():
    """Fails when weights are drawn in another way: then count up `INITIALISATION`."""
    from vimtune.models.vim import INITIALISATION

    model = create(0)
    drawn = torch.cat([p.detach().flatten().double() for p in model.parameters()])
    found = [drawn.sum().item(), drawn.square().sum().item(), (drawn * torch.arange(len(drawn))).sum().item()]
    assert (INITIALISATION, found) == (1, pytest.approx(EXPECTED_DRAWS, rel=1e-4))


EXPECTED_DRAWS = [3511.1646, 12104.5478, 21358322.0]


@pytest.mark.usefixtures("no_pictures", "each_flower_is_painted_once")
@pytest.mark.parametrize("base", ["drawn", "resized"])
def test_a_run_goes_on_and_predicts_on_another_machine(tmp_path, weights, another_machine, capsys, base):
    run = tmp_path / "run"
    flags = (
        f"--output-dir {run} --model test_vim --img-size 40 --peft lora --epochs 1 --num-workers 0 "
        "--batch-size 8 --device cpu --model-kwargs depth=2 "
        "--dataset-kwargs species=2,train_per_species=8,val_per_species=4,test_per_species=4"
    )
    start = ["--no-pretrained"] if base == "drawn" else ["--checkpoint", str(weights)]
    assert cli.train_main([*flags.split(), *start]) == 0
    here = load_predictor(run, device="cpu").model.pos_embed
    another_machine()
    there = load_predictor(run, device="cpu").model.pos_embed
    assert not torch.equal(here, there)
    torch.testing.assert_close(here, there)
    assert cli.train_main(["--resume", str(run), "--epochs", "2"]) == 0
    # Weights that are really others are refused, and --force takes them.
    save_file(create(seed=3).state_dict(), tmp_path / "other.safetensors")
    command = ["merge", str(run), "-o", str(tmp_path / "m.safetensors")]
    command += ["--checkpoint", str(tmp_path / "other.safetensors")]
    assert cli.main(command) == 2
    assert "other base weights of test_vim" in capsys.readouterr().err
    assert cli.main([*command, "--force"]) == 0


# --- and other weights are not

CHANGES = {
    "a step": lambda model: trained(model),
    "one number": lambda model: model.norm_f.weight.data[3:4].add_(1e-6),
    "through numpy": lambda model: model.norm_f.weight.detach().numpy().__setitem__(3, 0.5),
    "another parameter": lambda model: setattr(model.norm_f, "weight", another(model.norm_f.weight)),
    "other weights": lambda model: model.load_state_dict(create(6).state_dict()),
    "one other weight": lambda model: model.load_state_dict(
        {"cls_token": torch.ones(1, 1, 16)}, strict=False
    ),
    "a failed load": lambda model: failed_loading(model),
    "exchanged blocks": lambda model: model.layers[0].load_state_dict(model.layers[1].state_dict()),
    "initialised again": lambda model: model._init_weights(),
}


def failed_loading(model) -> None:
    with pytest.raises(RuntimeError):
        model.load_state_dict({**create(6).state_dict(), "x": torch.zeros(1)})


def another(parameter) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.rand_like(parameter))


def trained(model) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    side = model.patch_embed.img_size
    model(torch.randn(2, 3, *side, dtype=model.cls_token.dtype)).float().square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("start", ["drawn", "loaded", "resized", "cast", "cast after drawing"])
def test_no_changed_weights_are_recognised(weights, start, change):
    model = {
        "drawn": lambda: create(7),
        "loaded": lambda: vimtune.load_checkpoint(create(7), weights),
        "resized": lambda: vimtune.load_checkpoint(create(7, img_size=48), weights),
        "cast": lambda: vimtune.load_checkpoint(create(7), weights).double(),
        "cast after drawing": lambda: create(7).double(),
    }[start]()
    if change == "other weights" and start == "resized":
        pytest.skip("these have another shape")
    before = identity(model)
    torch.manual_seed(0)
    CHANGES[change](model)
    after = identity(model)
    assert before.origin != after.origin and before.bits != after.bits
    # What was changed and then exported is known by its values.
    again = loaded(
        create(8, img_size=model.patch_embed.img_size).to(model.cls_token.dtype), model.state_dict()
    )
    assert identity(again).bits == after.bits and has_base(adapted(again), after.bits, after.origin)


def test_weights_that_lose_bits_are_not_those_of_another_file(tmp_path, weights):
    """Two files that round to the same bf16 numbers are two files."""
    near = {name: value * (1 + 2**-20) for name, value in load_file(weights).items()}
    save_file(near, tmp_path / "near.safetensors")
    one, other = (
        identity(vimtune.load_checkpoint(create(dtype=torch.bfloat16), path))
        for path in (weights, tmp_path / "near.safetensors")
    )
    assert one.origin != other.origin


def test_a_resized_embedding_that_was_changed_before_loading_is_another(weights):
    models = [create(img_size=48) for _ in range(3)]
    states = [checkpoint_filter_fn(load_file(weights), model) for model in models]
    states[1]["pos_embed"].mul_(1.5)
    states[2]["pos_embed"] = states[2]["pos_embed"].clone()  # forgets what it was made from, no more
    for model, state in zip(models, states, strict=True):
        model.load_state_dict(state)
    resized, changed, copied = map(identity, models)
    assert resized.origin == identity(vimtune.load_checkpoint(create(), weights)).origin
    assert len({resized.origin, changed.origin, copied.origin}) == 3 and copied.bits == resized.bits


def test_another_architecture_is_named(saved):
    with pytest.raises(AdapterFileError, match=r"trained on test_vim.*: stride 8 there and 6 here"):
        vimtune.load_adapter(create(stride=6), saved)
    with pytest.raises(AdapterFileError, match=r"embed_dim 16 there and 32 here; depth 2 there and 3 here"):
        vimtune.load_adapter(create(embed_dim=32, depth=3), saved)
    with pytest.raises(AdapterFileError, match="other base weights of test_vim"):
        vimtune.load_adapter(create(), saved)


# --- files of the first format


def first_format(model) -> str:
    """The hash as version 0.1.0 computed it."""
    digest = hashlib.sha256()
    for path, parameter in sorted(base_parameters(model)):
        if not path.startswith("head."):
            values = parameter.detach().cpu().contiguous()
            digest.update(f"{path} {tuple(values.shape)} {values.dtype}\n".encode())
            digest.update(values.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("same", [True, False])
def test_files_of_the_first_format_are_still_recognised(weights, saved, same):
    with safe_open(saved, "pt") as file:
        metadata = file.metadata()
    info = json.loads(metadata["info"])
    del info["base_origin"]
    info["base_hash"] = first_format(vimtune.load_checkpoint(create(), weights))
    save_file(load_file(saved), saved, metadata={**metadata, "info": json.dumps(info)})
    model = vimtune.load_checkpoint(create(), weights) if same else create()
    if same:
        vimtune.load_adapter(model, saved)
    else:
        with pytest.raises(AdapterFileError, match="other base weights"):
            vimtune.load_adapter(model, saved)
        vimtune.load_adapter(model, saved, force=True)


# --- models without numbers


def test_models_without_numbers_are_created_and_converted():
    for mode in (torch.device("meta"), FakeTensorMode()):
        with mode:
            model = create_listed_model("test_vim", SMALL)
            assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 5)
    assert on_meta().half().cls_token.dtype == torch.half
    real = on_meta().to_empty(device="cpu")
    real.load_state_dict(create(3).state_dict())
    assert identity(real).bits == identity(create(3)).bits


def test_creation_and_loading_hash_nothing_in_the_ordinary_case(monkeypatch, weights):
    """The identity costs time where it is asked for, not where models are made."""
    from vimtune.adapters import identity as module

    monkeypatch.setattr(module, "tensor_digest", lambda tensor: pytest.fail("hashed"))
    model = vimtune.load_checkpoint(create(), weights)
    model.load_state_dict(load_file(weights))
    model.to("cpu", torch.float32)
    create().double()


# --- what an adapter replaces


def test_weights_that_an_adapter_replaces_have_an_identity_of_their_own(tmp_path, weights, caplog):
    path = tmp_path / "adapter.safetensors"
    trained = vimtune.inject(vimtune.load_checkpoint(create(1, num_classes=3), weights), "bitfit")
    vimtune.save_adapter(trained, path)
    again = vimtune.load_checkpoint(create(2), weights).bfloat16()
    vimtune.load_adapter(again, path)
    check_replaced(again, path, force=False)  # heads and dtypes do not count
    with torch.no_grad():
        dict(base_parameters(again))["layers.1.mixer.conv1d.bias"][0] += 1
    with pytest.raises(AdapterFileError, match=r"'layers\.0\.mixer\.conv1d\.bias' and \d+ more\) is not"):
        check_replaced(again, path, force=False)
    check_replaced(again, path, force=True)
    vimtune.load_adapter(again, path)
    forget_replaced(path)
    check_replaced(again, path, force=False)
    assert "written by an earlier version" in caplog.messages[-1]


def forget_replaced(path):
    """Make of an adapter file one of version 4."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    info = json.loads(metadata["info"])
    del info["replaced_hash"], info["replaced_origin"]
    save_file(load_file(path), path, {**metadata, "info": json.dumps({**info, "version": 4})})
