"""Adapters in HF peft's format: what peft writes computes the same here, and what we write the same there."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import vimtune
from vimtune.exchange.peft import FORMS
from vimtune.exchange.peft.files import load_peft, save_peft
from vimtune.methods import METHODS
from vimtune.testing.methods import close, disturb


class Net(nn.Module):
    """Every kind of module that HF peft adapts as we do, and a head."""

    num_classes = 3

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(10, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.first = nn.Linear(8, 12)
        self.second = nn.Linear(12, 8, bias=False)
        self.head = nn.Linear(8, 3)

    def get_classifier(self):
        return self.head

    def forward(self, ids):
        x = self.conv(self.tokens(ids).mT).mT
        return self.head(self.second(torch.relu(self.first(x))).mean(1))


def net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().eval()


IDS = torch.arange(12).view(2, 6) % 10
ALL = ["tokens", "conv", "first", "second"]
LINEAR = ["first", "second"]

OURS = {
    "lora": ("lora", {"targets": ALL, "rank": {"first": 2, "second": 4, "tokens,conv": 3}, "alpha": 6.0}),
    "rslora": ("lora", {"targets": LINEAR, "rank": 4, "scaling": "rslora", "dropout": 0.1}),
    "pissa": ("lora", {"targets": LINEAR, "rank": 2, "start": "pissa"}),
    "dora": ("dora", {"targets": ["conv", *LINEAR], "rank": 3}),
    "dora of tokens": ("dora", {"targets": "tokens", "rank": 3, "axis": "input"}),
    "ia3": ("ia3", {"targets": LINEAR, "side": {"first": "input", "second": "output"}}),
    "c3a": ("c3a", {"targets": LINEAR, "block_size": {"first": 4, "second": 2}}),
    "oft": ("oft", {"targets": LINEAR, "block_size": 4}),
    "oft by a series": ("oft", {"targets": LINEAR, "block_size": 4, "series": 5}),
}


def adapted(case):
    method, options = OURS[case]
    torch.manual_seed(1)
    return disturb(vimtune.inject(net(), method, num_classes=3, **options))


@pytest.mark.parametrize("case", OURS)
def test_what_we_write_is_read_here(tmp_path, case):
    model = adapted(case)
    save_peft(model, tmp_path / "out")
    again = net()
    record = load_peft(again, tmp_path / "out")
    close(again(IDS), model(IDS), 1e-6)
    assert record.sites.keys() == {OURS[case][0]} and vimtune.list_adapters(again) == ["default"]
    save_peft(again, tmp_path / "again")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft", reason="the other side of the format, HF peft, is not installed")


@pytest.mark.parametrize("case", OURS)
def test_what_we_write_is_read_by_peft(tmp_path, peft, case):
    model = adapted(case)
    save_peft(model, tmp_path / "out")
    theirs = peft.PeftModel.from_pretrained(net(), tmp_path / "out").eval()
    close(theirs(IDS), model(IDS))
    assert (theirs(IDS) - net()(IDS)).abs().max() > 1e-2


def theirs(peft, case):
    linear = {"target_modules": LINEAR, "modules_to_save": ["head"]}
    return {
        "lora": lambda: peft.LoraConfig(
            target_modules=ALL, r=2, rank_pattern={"first": 4}, alpha_pattern={"second": 3}, lora_dropout=0.1
        ),
        "rslora": lambda: peft.LoraConfig(**linear, r=4, use_rslora=True),
        "dora": lambda: peft.LoraConfig(target_modules=[*ALL], r=2, use_dora=True, modules_to_save=["head"]),
        "lora with more targets": lambda: peft.LoraConfig(
            r=2, target_modules=[*LINEAR, "head", "elsewhere"], modules_to_save=["head"]
        ),
        "lora with exclusions": lambda: peft.LoraConfig(
            **linear | {"target_modules": ALL}, r=2, exclude_modules=["conv"]
        ),
        "lora by a regular expression": lambda: peft.LoraConfig(target_modules=r"(fir|seco).*", r=2),
        "lora of all linear layers": lambda: peft.LoraConfig(
            target_modules="all-linear", r=2, modules_to_save=["head"]
        ),
        "ia3": lambda: peft.IA3Config(target_modules=LINEAR, feedforward_modules=["first"]),
        "c3a": lambda: peft.C3AConfig(**linear, block_size=4),
        "oft": lambda: peft.OFTConfig(**linear, oft_block_size=4, use_cayley_neumann=False),
        "oft by a series": lambda: peft.OFTConfig(**linear, oft_block_size=4),
        "oft by four terms": lambda: peft.OFTConfig(**linear, oft_block_size=4, num_cayley_neumann_terms=3),
    }[case]()


@pytest.mark.parametrize(
    "case",
    [
        *("lora", "lora with more targets", "lora with exclusions", "lora by a regular expression"),
        *("lora of all linear layers", "rslora", "dora", "ia3", "c3a"),
        *("oft", "oft by a series", "oft by four terms"),
    ],
)
def test_what_peft_writes_is_read_here(tmp_path, peft, case):
    torch.manual_seed(1)
    model = peft.get_peft_model(net(), theirs(peft, case)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    ours = net()
    load_peft(ours, tmp_path, name="theirs")
    close(ours(IDS), model(IDS))
    assert (ours(IDS) - net()(IDS)).abs().max() > 1e-3
    close(vimtune.merge(ours)(IDS), model(IDS))


def test_rules_for_rows_are_written_as_lora_of_the_whole_weight(tmp_path):
    model = vimtune.inject(
        build_vim(), "lora", targets=["in_proj[x]", "in_proj[z]"], rank={"in_proj[x]": 2}, alpha=3.0
    )
    disturb(model)
    save_peft(model, tmp_path / "out")
    again = build_vim()
    record = load_peft(again, tmp_path / "out")
    assert record.options["lora"]["rank"] == 18 and record.num_classes == 5
    images = torch.randn(2, 3, 32, 32)
    close(again(images), model(images))


def build_vim():
    from vimtune.testing.methods import build_test_model

    return build_test_model(1).eval()


def test_mamba_of_transformers(tmp_path, peft):
    transformers = pytest.importorskip("transformers", reason="no transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 20, "state_size": 4}

    def language_model():
        torch.manual_seed(0)
        return transformers.MambaForCausalLM(transformers.MambaConfig(**sizes)).eval()

    ids = torch.arange(10).view(1, 10)
    model = disturb(vimtune.inject(language_model(), "lora", targets="in_proj", rank=4))
    save_peft(model, tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["target_modules"] == ["in_proj"] and settings["base_model_name_or_path"] is None
    read = peft.PeftModel.from_pretrained(language_model(), tmp_path / "out").eval()
    close(read(ids).logits, model(ids).logits)
    read.save_pretrained(tmp_path / "back")
    again = language_model()
    load_peft(again, tmp_path / "back")
    close(again(ids).logits, model(ids).logits)


def test_every_type_that_a_method_names_is_there():
    assert {method.peft_type for _, method in METHODS.items()} - {None} == set(FORMS)


# --- what is refused


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("prodial", {"targets": "first", "rank": 2}, "method 'prodial' does not exist in HF peft"),
        (
            "lora+c3a",
            {"targets": {"lora": "first", "c3a": "second"}, "rank": 2},
            "needs the types C3A, LORA of HF peft",
        ),
        (
            "dora",
            {"targets": "tokens", "rank": 2},
            "axis 'output', and HF peft has it with 'input' for a Embedding",
        ),
        ("ia3", {"targets": "first"}, "first has a bias, which HF peft multiplies"),
        ("c3a", {"targets": "conv"}, "conv is a Conv1d: this type of HF peft has Linear"),
        ("oft", {"targets": LINEAR, "block_size": {"first": 4, "second": 6}}, "here are blocks of 4, 6"),
    ],
)
def test_what_peft_cannot_express_is_refused(tmp_path, method, options, message):
    model = vimtune.inject(net(), method, **options)
    with pytest.raises(ValueError, match=message):
        save_peft(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tied_weights_are_refused(tmp_path):
    model = net()
    model.other = nn.Embedding(10, 8)
    model.other.weight = model.tokens.weight
    vimtune.inject(model, "lora", targets="tokens", rank=2)
    with pytest.raises(ValueError, match=r"tokens\.weight and other\.weight are one weight"):
        save_peft(model, tmp_path / "out")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft") / "saved"
    save_peft(adapted("lora"), folder)
    return folder


def changed(saved, tmp_path, settings=(), tensors=(), without=()):
    values = json.loads((saved / "adapter_config.json").read_text()) | dict(settings)
    kept = {key: value for key, value in load_file(saved / "adapter_model.safetensors").items()}
    kept |= dict(tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    save_file(
        {key: v for key, v in kept.items() if key not in without}, tmp_path / "adapter_model.safetensors"
    )
    return tmp_path


FIRST = "base_model.model.first.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": {"bias": "all"}}, r"bias: Input should be 'none' \(found 'all'\)"),
        ({"settings": {"fan_in_fan_out": True}}, "fan_in_fan_out"),
        (
            {"settings": {"init_lora_weights": "pissa"}},
            "start changes the base.*path_initial_model_for_",
        ),
        ({"settings": {"init_lora_weights": "unheard of"}}, "init_lora_weights is 'unheard of'"),
        ({"settings": {"init_lora_weights": 3}}, "init_lora_weights"),
        ({"settings": {"use_bdlora": {"nblocks": 2}}}, "use_bdlora"),
        (
            {"settings": {"peft_type": "VERA"}},
            "peft_type is 'VERA': expected one of LORA, IA3, OFT, C3A, which can be read here$",
        ),
        ({"settings": {"peft_type": 3}}, "peft_type is 3: expected one of"),
        ({"settings": {"alpha_pattern": {"(a+)+": 2.0}}}, "is a regular expression"),
        ({"settings": {"lora_alpha": "8"}}, "lora_alpha"),
        ({"tensors": {"base_model.model.nowhere.lora_A.weight": torch.ones(2, 2)}}, "adapts 'nowhere'"),
        ({"tensors": {"first.lora_A.weight": torch.ones(2, 8)}}, "unexpected tensor 'first"),
        ({"tensors": {"base_model.model.lm_head.weight": torch.ones(2, 8)}}, "unexpected tensor"),
        ({"tensors": {"base_model.model.head.lora_A.weight": torch.ones(2, 8)}}, "adapts 'head'"),
        ({"tensors": {FIRST: torch.full((2, 8), torch.nan)}}, "not finite"),
        ({"tensors": {FIRST: torch.ones(2, 9)}}, "has shape"),
        ({"tensors": {FIRST: torch.ones(8)}}, "no matrices"),
        ({"without": [FIRST]}, "first has the tensors lora_B"),
        (
            {"settings": {"target_modules": ["second", "tokens", "conv", "irst"]}},
            r"it has tensors for 'first', and its target_modules \['second', .*\] do not name that: expected",
        ),
        (
            {"without": [FIRST, FIRST.replace("_A", "_B")]},
            "its target_modules name 'first', and it has no tensors for that: expected settings and tensors",
        ),
        ({"without": ["base_model.model.head.bias"]}, r"missing head\.bias\.value"),
    ],
)
def test_files_of_others_are_not_believed(tmp_path, saved, change, message):
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(vimtune.AdapterFileError, match=message) as caught:
        load_peft(model, changed(saved, tmp_path, **change))
    assert "\n" not in str(caught.value) and not vimtune.list_adapters(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal"])
def test_starts_that_leave_the_base_as_it_is_do_not_matter(tmp_path, saved, start):
    model = net()
    load_peft(model, changed(saved, tmp_path, {"init_lora_weights": start}))
    assert vimtune.list_adapters(model) == ["default"]


def test_settings_of_later_versions_that_are_off_do_no_harm(tmp_path, saved):
    later = {"new_thing": None, "other_thing": False, "list_of_things": [], "corda_config": None}
    model = net()
    load_peft(model, changed(saved, tmp_path, later))
    close(model(IDS), adapted("lora")(IDS), 1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": [*ALL, "elsewhere", "head"]},  # None of the model, and one that is trained whole.
        {"target_modules": "all-linear"},
        {"target_modules": "(a+)+$"},  # A regular expression is not run.
    ],
)
def test_target_modules_that_do_not_contradict_the_tensors(tmp_path, saved, settings):
    model = net()
    load_peft(model, changed(saved, tmp_path, settings))
    close(model(IDS), adapted("lora")(IDS), 1e-6)


@pytest.mark.parametrize("settings", [{"exclude_modules": ["first"]}, {"layers_to_transform": 0}])
def test_modules_that_settings_take_away_need_no_tensors(tmp_path, saved, settings):
    load_peft(net(), changed(saved, tmp_path, settings, without=[FIRST, FIRST.replace("_A", "_B")]))


def test_no_path_of_this_computer_is_written(tmp_path):
    model = adapted("lora")
    (tmp_path / "base").mkdir()
    for name in (str(tmp_path / "base"), "state-spaces/mamba-130m-hf"):
        model.config = type("Config", (), {"_name_or_path": name})()
        folder = tmp_path / f"out{len(name)}"
        save_peft(model, folder)
        written = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert written == (name if name.startswith("state") else None)


def test_series_of_old_versions_are_refused(tmp_path):
    save_peft(adapted("oft by a series"), tmp_path / "saved")
    (tmp_path / "old").mkdir()
    with pytest.raises(vimtune.AdapterFileError, match="series was another one"):
        load_peft(net(), changed(tmp_path / "saved", tmp_path / "old", {"peft_version": None}))


def test_missing_files_are_named(tmp_path):
    with pytest.raises(vimtune.AdapterFileError, match=r"has no adapter_config\.json"):
        load_peft(net(), tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(vimtune.AdapterFileError, match=r"no adapter_model\.safetensors.*can run code"):
        load_peft(net(), tmp_path)
