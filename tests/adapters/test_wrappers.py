"""A wrapper is never taken for a model without adapters: it is seen through, or refused with the reason."""

from __future__ import annotations

import copy
import io
import pickle
import re
import sys

import pytest
import timm
import torch
import torch.distributed as dist
from method_cases import CASES, disturb, label, options_for
from timm.models._features import FeatureGetterNet
from torch import nn

import vimtune
from vimtune.adapters import adapter_parameters, adapter_state_dict, base_hash, check_gradients


def plain(**options):
    torch.manual_seed(0)
    return timm.create_model("test_vim", num_classes=5, depth=2, backend="torch", **options).eval()


def adapted(method="lora", **options):
    return disturb(vimtune.inject(plain(), method, **options_for(method, options)))


def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


SEEN_THROUGH = {
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "DataParallel": nn.DataParallel,
    "features_only": lambda model: FeatureGetterNet(model, out_indices=1),
    "both": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
}


@pytest.mark.parametrize("wrap", SEEN_THROUGH.values(), ids=SEEN_THROUGH)
def test_everything_through_a_wrapper(wrap, tmp_path):
    wrapped = wrap(plain())
    assert vimtune.inject(wrapped, "lora", rank=3) is wrapped
    names = {item.name for item in adapter_parameters(wrapped)}
    assert not any(name.startswith(("_orig_mod", "module", "model")) for name in names)
    assert vimtune.list_adapters(wrapped) == ["default"]
    assert vimtune.summary(wrapped).method == "lora"
    disturb(wrapped)
    vimtune.save_adapter(wrapped, tmp_path / "a.safetensors")
    assert vimtune.load_adapter(wrapped, tmp_path / "a.safetensors").method == "lora"
    assert vimtune.list_adapters(wrapped) == ["default", "default_2"]
    assert base_hash(wrapped) and adapter_state_dict(wrapped)
    with vimtune.disabled(wrapped):
        assert not any(parameter.requires_grad for parameter in wrapped.parameters())
    vimtune.delete_adapter(wrapped, "default")
    vimtune.set_adapter(wrapped, "default_2")
    assert vimtune.merge(wrapped) is wrapped
    assert vimtune.list_adapters(wrapped) == [] and not any("adapters" in key for key in wrapped.state_dict())


def test_a_head_under_a_wrapper_is_trained():
    wrapped = nn.DataParallel(plain())
    vimtune.inject(wrapped, "lora", rank=3)
    heads = {item.base_name for item in adapter_parameters(wrapped) if item.group == "head"}
    assert heads == {"head.weight", "head.bias"}


def test_a_compiled_model_follows_its_adapters():
    torch._dynamo.reset()
    model = plain()
    compiled = torch.compile(model, backend="eager")
    base = compiled(images())
    disturb(vimtune.inject(compiled, "lora", rank=3))
    changed = compiled(images())
    torch.testing.assert_close(changed, model(images()))
    assert not torch.allclose(changed, base, atol=1e-3)
    with vimtune.disabled(compiled):
        torch.testing.assert_close(compiled(images()), base)
    vimtune.merge(compiled)
    torch.testing.assert_close(compiled(images()), changed)


def test_distributed_data_parallel(process_group, tmp_path):
    """What it trains is fixed when it is made; anything else may be asked of it."""
    model = adapted()
    wrapped = nn.parallel.DistributedDataParallel(model)
    assert vimtune.list_adapters(wrapped) == ["default"]
    assert vimtune.summary(wrapped) == vimtune.summary(model)
    vimtune.save_adapter(wrapped, tmp_path / "a.safetensors")
    with vimtune.disabled(wrapped):
        torch.testing.assert_close(wrapped(images()), plain()(images()))
    wrapped(images()).sum().backward()
    check_gradients(wrapped)
    for change in (
        lambda: vimtune.inject(wrapped, "lora", name="other", rank=3),
        lambda: vimtune.load_adapter(wrapped, tmp_path / "a.safetensors"),
        lambda: vimtune.set_adapter(wrapped, None),
        lambda: vimtune.delete_adapter(wrapped, "default"),
        lambda: vimtune.merge(wrapped),
    ):
        with pytest.raises(ValueError, match="DistributedDataParallel sums the gradients"):
            change()
    assert vimtune.list_adapters(wrapped) == ["default"]


class Around(nn.Module):
    """A user's own module around a backbone."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.out = nn.Linear(5, 2)

    def forward(self, x):
        return self.out(self.backbone(x))


def uses(model, path):
    """Every way to ask for adapters."""
    return [
        lambda: vimtune.inject(model, "lora", rank=2, name="other"),
        lambda: vimtune.merge(model),
        lambda: vimtune.summary(model),
        lambda: vimtune.list_adapters(model),
        lambda: vimtune.set_adapter(model, None),
        lambda: vimtune.delete_adapter(model, "default"),
        lambda: vimtune.disabled(model).__enter__(),
        lambda: vimtune.save_adapter(model, path),
        lambda: vimtune.load_adapter(model, path),
        lambda: list(adapter_parameters(model)),
        lambda: adapter_state_dict(model),
        lambda: base_hash(model),
    ]


def test_unknown_containers_are_refused_by_path(tmp_path):
    model = adapted()
    before = copy.deepcopy(model.state_dict())
    for use in uses(Around(model), tmp_path / "a.safetensors"):
        with pytest.raises(ValueError, match="the Around contains a model with adapters at 'backbone'"):
            use()
    assert list(model.state_dict()) == list(before) and not list(tmp_path.iterdir())


def test_parts_of_an_adapted_model_are_refused(tmp_path):
    for use in uses(adapted().layers, tmp_path / "a.safetensors"):
        with pytest.raises(ValueError, match="this Blocks is made of parts of a model with adapters"):
            use()


@pytest.mark.parametrize("around", [Around, lambda model: nn.Sequential(nn.Identity(), model)])
def test_inject_refuses_to_freeze_the_head_of_a_model_inside(around):
    model = around(plain())
    with pytest.raises(ValueError, match=r"contains a VisionMamba with a classification head at '\w+'"):
        vimtune.inject(model, "lora", rank=2)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_torchscript_is_refused():
    with pytest.raises(ValueError, match="ScriptModule: TorchScript has compiled its weights in"):
        vimtune.list_adapters(torch.jit.script(plain()))


def test_sharded_models_are_refused_by_name(process_group):
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    def shard(module):
        return FullyShardedDataParallel(module, device_id=torch.device("cpu"))

    inside = plain()
    inside.layers = shard(inside.layers)
    for model in (shard(plain()), inside):
        with pytest.raises(ValueError, match="under FullyShardedDataParallel: it flattens and shards"):
            vimtune.inject(model, "lora", rank=2)
    model = plain()
    fully_shard(model)
    with pytest.raises(ValueError, match=r"head.weight cannot take a rule: it is a DTensor"):
        vimtune.inject(model, "lora", rank=2)


# --- load_state_dict of a module around the model


def test_a_plain_checkpoint_loads_strictly_under_a_prefix():
    around, other = Around(adapted("full")), Around(plain())
    nn.init.ones_(other.out.bias)
    expected = around.backbone(images())
    assert not around.load_state_dict(other.state_dict()).missing_keys
    assert torch.equal(around.out.bias, other.out.bias)
    assert torch.equal(around.backbone(images()), expected)


def test_buffers_of_the_base_are_part_of_a_plain_checkpoint():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    state = {f"0.{key}": value for key, value in model.state_dict().items()}
    around = nn.Sequential(vimtune.inject(model, "ft", targets="0"))
    assert not around.load_state_dict(state).missing_keys
    del state["0.1.running_mean"]
    with pytest.raises(RuntimeError, match="running_mean"):
        around.load_state_dict(state)


def test_a_checkpoint_with_some_of_the_adapter_is_refused():
    around = Around(adapted())
    state = around.state_dict()
    lost = [key for key in state if "layers.0" in key and "lora_A" in key]
    for key in lost:
        del state[key]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*backbone.layers.0.mixer.in_proj.adapters"):
        around.load_state_dict(state)


def test_assign():
    model = adapted("lora+ft", targets={"lora": "both", "ft": "A_log,pos_embed"})
    state = {key: value + 1 for key, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    trained = {item.name for item in adapter_parameters(model)}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
    expected = model(images())
    model.load_state_dict({key: value for key, value in state.items() if "adapters" not in key}, assign=True)
    assert torch.equal(model(images()), expected)


def test_a_deleted_adapter_leaves_no_hook():
    model = adapted()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        vimtune.delete_adapter(twin, "default")
        assert not twin._load_state_dict_pre_hooks and vars(twin).keys() == vars(plain()).keys()


# --- models without parameters of their own, and models in files


@pytest.fixture(params=CASES, ids=label)
def case(request):
    return request.param


def replicas(model, monkeypatch):
    """Two copies as DataParallel makes them for two GPUs, by torch's code, on the CPU."""
    module = sys.modules["torch.nn.parallel.replicate"]
    monkeypatch.setattr(module, "_get_device_index", lambda device, optional: device)
    monkeypatch.setattr(
        module,
        "_broadcast_coalesced_reshape",
        lambda tensors, devices, detach=False: [[tensor.clone() for tensor in tensors] for _ in devices],
    )
    return module.replicate(model, [0, 0])


def test_replicas_of_a_plain_model(monkeypatch):
    model = plain()
    for replica in replicas(model, monkeypatch):
        assert torch.equal(replica(images()), model(images()))


def test_replicas_of_an_adapted_model(case, monkeypatch):
    model = adapted(case[0], **case[1])
    outputs = [replica(images()) for replica in replicas(model, monkeypatch)]
    assert all(torch.equal(output, model(images())) for output in outputs)
    sum(output.square().sum() for output in outputs).backward()
    found = {item.name: item.parameter.grad for item in adapter_parameters(model)}
    model.zero_grad()
    (2 * model(images()).square().sum()).backward()
    for item in adapter_parameters(model):
        torch.testing.assert_close(found[item.name], item.parameter.grad)


def test_only_replicas_have_plain_tensors_assigned():
    linear = adapted().layers[0].mixer.in_proj
    with pytest.raises(TypeError, match="cannot assign"):
        linear.weight = torch.zeros(1)
    del linear._parameters["weight"]
    with pytest.raises(AttributeError, match="'weight' has rules of an adapter"):
        linear.weight = torch.zeros(1)


def test_pickle_and_torch_save_of_the_model(case):
    model = adapted(case[0], **case[1])
    vimtune.inject(model, "bitfit", name="other", num_classes=3)
    vimtune.set_adapter(model, "default")
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert vimtune.list_adapters(twin) == ["default", "other"]
        assert torch.equal(twin(images()), model(images()))
        disturb(twin, seed=5)
        assert not torch.equal(twin(images()), model(images()))
        vimtune.set_adapter(twin, "other")
        vimtune.merge(twin)
        assert type(twin.layers[0].mixer.in_proj) is nn.Linear and twin(images()).shape == (2, 3)


def test_models_on_the_meta_device(case, tmp_path):
    """Shapes and sizes are known without values, and nothing takes them for values."""
    model = vimtune.inject(plain().to("meta"), case[0], **options_for(*case))
    assert model(images().to("meta")).shape == (2, 5)
    assert vimtune.summary(model) == vimtune.summary(vimtune.inject(plain(), case[0], **options_for(*case)))
    with pytest.raises(ValueError, match=r"has no values \(device meta\)"):
        vimtune.save_adapter(model, tmp_path / "a.safetensors")
    try:
        merged = vimtune.merge(vimtune.inject(plain(), case[0], **options_for(*case)))
    except ValueError as error:
        with pytest.raises(ValueError, match=re.escape(str(error))):
            vimtune.merge(copy.deepcopy(model))
    else:
        assert list(vimtune.merge(copy.deepcopy(model)).state_dict()) == list(merged.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: .*head.adapters.weight"):
        model.load_state_dict(plain().state_dict(), assign=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("method", [None, "lora", "strong"])
def test_dynamic_quantisation_leaves_layers_alone_that_are_read(method):
    model = plain() if method is None else adapted(method)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert isinstance(quantised.layers[0].mixer.x_proj.weight, torch.Tensor)
    assert isinstance(quantised.layers[0].mixer.in_proj, nn.Linear) == (method is not None)
    torch.testing.assert_close(quantised(images()), model(images()), atol=0.02, rtol=0.02)
