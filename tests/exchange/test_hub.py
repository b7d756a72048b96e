"""convert, push and pull, against a stand-in for the hub, and what timm and HF peft make of the result."""

from __future__ import annotations

import json
import os
import re
import socket
import stat
from pathlib import Path

import pytest
import timm
import torch
import yaml
from adapter_files import make_adapter, rewrite, write_photos
from huggingface_hub import constants, file_download
from huggingface_hub.errors import HfHubHTTPError
from stand_in_hub import stand_in

import vimtune
from vimtune import cli
from vimtune.exchange import hub as hub_files
from vimtune.exchange.base import code_for_base
from vimtune.exchange.card import write_card
from vimtune.exchange.formats import FORMATS
from vimtune.exchange.hub import HubError
from vimtune.exchange.local_paths import without_paths


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run folder without a report, and its model."""
    folder = tmp_path_factory.mktemp("made") / "my-run"
    folder.mkdir()
    model = make_adapter(folder / "adapter.safetensors", rank=2)
    rewrite(folder / "adapter.safetensors", lambda info: info["extra"].update(log=str(folder / "log.txt")))
    return folder, model


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The stand-in, which huggingface_hub takes for the hub, and an empty cache."""
    with stand_in() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
        for module in (constants, file_download):  # the latter in earlier versions
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        yield served


def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def card_of(folder: Path) -> tuple[dict, str]:
    _, front, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), text


def test_an_adapter_goes_to_the_hub_and_back(tmp_path, made, hub, capsys):
    folder, model = made
    assert cli.main(["push", str(folder), "me/flowers", "--private"]) == 0
    assert f"uploaded to {hub.url}/me/flowers" in capsys.readouterr().out
    assert (
        hub.files["me/flowers"].keys() == {"adapter.safetensors", "README.md"} and hub.private["me/flowers"]
    )
    assert str(folder.parent).encode() not in b"".join(hub.files["me/flowers"].values())
    hub.files["me/flowers"]["evil.py"] = b"raise SystemExit"
    assert cli.main(["pull", "me/flowers", "-o", str(tmp_path / "pulled")]) == 0
    assert sorted(path.name for path in (tmp_path / "pulled").iterdir()) == [
        "README.md",
        "adapter.safetensors",
    ]
    predictor = vimtune.load_predictor(tmp_path / "pulled")
    torch.testing.assert_close(predictor.logits(images()), model(images()), rtol=0, atol=1e-6)
    photos = [str(path) for path in write_photos(tmp_path / "photos")]
    assert cli.main(["predict", *photos, "--adapter", str(tmp_path / "pulled")]) == 0
    meta, text = card_of(tmp_path / "pulled")
    assert meta["library_name"] == "vimtune" and meta["pipeline_tag"] == "image-classification"
    assert "lora" in meta["tags"] and "species 3" in text and "rank: 2" in text
    assert re.search(r'pull\("me/flowers"', text)


@pytest.mark.parametrize("to", ["vimtune", "peft", "merged"])
def test_a_card_names_the_license_that_is_given(to, tmp_path, made, hub, capsys):
    folder, _ = made
    given = ["--to", to, "--license", "cc-by-nc-4.0"]
    assert cli.main(["convert", str(folder), "-o", str(tmp_path / "out"), *given]) == 0
    assert card_of(tmp_path / "out")[0]["license"] == "cc-by-nc-4.0"
    assert cli.main(["push", str(folder), "me/licensed", *given]) == 0
    assert b"license: cc-by-nc-4.0" in hub.files["me/licensed"]["README.md"]
    vimtune.convert(folder, tmp_path / "silent", to=to)
    assert "license" not in card_of(tmp_path / "silent")[0]
    capsys.readouterr()
    assert cli.main(["convert", str(folder), "-o", str(tmp_path / "x"), "--license", "Apache 2"]) == 2
    assert "license = 'Apache 2': expected its name on the Hugging Face hub" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows knows no such rights")
@pytest.mark.parametrize("to", ["vimtune", "peft", "merged"])
def test_all_files_have_the_rights_of_new_files(to, tmp_path, made):
    """Others of the group could read the card, and not the weights."""
    before = os.umask(0o027)
    try:
        folder = vimtune.convert(made[0], tmp_path / "given", to=to)
    finally:
        os.umask(before)
    rights = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*")}
    assert len(rights) > 1 and set(rights.values()) == {0o640}


def test_without_a_network(tmp_path, made, hub, monkeypatch):
    folder, _ = made
    vimtune.push(folder, "me/flowers")
    vimtune.pull("me/flowers", tmp_path / "first")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    vimtune.pull("me/flowers", tmp_path / "second")
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set, and it has not been downloaded before"):
        vimtune.pull("me/others", tmp_path / "third")
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set, and 'me/flowers' is to be uploaded"):
        vimtune.push(folder, "me/flowers")
    assert not hub.asked and not (tmp_path / "third").exists()
    first, second = (tmp_path / name / "adapter.safetensors" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("source", ["hf-hub", "local-dir"])
def test_timm_loads_merged_models_by_itself(tmp_path, hub, source, monkeypatch):
    trained = make_adapter(tmp_path / "adapter.safetensors", rank=2, img_size=48)
    if source == "hf-hub":
        vimtune.push(tmp_path / "adapter.safetensors", "me/merged", to="merged")
        assert hub.files["me/merged"].keys() == {"config.json", "model.safetensors", "README.md"}
        assert (
            b'timm.create_model("hf-hub:me/merged", pretrained=True)' in hub.files["me/merged"]["README.md"]
        )
        place = "me/merged"
    else:
        place = vimtune.convert(tmp_path / "adapter.safetensors", tmp_path / "merged", to="merged")
        assert vimtune.load_predictor(place).classes[3] == "species 3"
    model = timm.create_model(f"{source}:{place}", pretrained=True).eval()
    batch = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(model(batch), trained(batch), rtol=1e-4, atol=1e-4)
    assert model.pretrained_cfg["label_names"][3] == "species 3" and model.num_classes == 5
    config = timm.data.resolve_model_data_config(model)
    own = vimtune.read_adapter_info(tmp_path / "adapter.safetensors").preprocessing
    assert list(config["input_size"][1:]) == own["img_size"] == [48, 48]
    assert [list(config["mean"]), config["crop_pct"]] == [own["mean"], own["crop_pct"]]


def test_the_format_of_peft(tmp_path, made, hub):
    folder, model = made
    assert cli.main(["convert", str(folder), "-o", str(tmp_path / "peft"), "--to", "peft"]) == 0
    names = {path.name for path in (tmp_path / "peft").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert card_of(tmp_path / "peft")[0]["library_name"] == "peft"
    # Where it will lie is not known yet, and the name of a folder would be no repository.
    assert '"OWNER/peft")' in (tmp_path / "peft" / "README.md").read_text("utf-8")
    with pytest.raises(vimtune.AdapterFileError, match=r"in HF peft's format.*vimtune\.load_peft\(model, "):
        vimtune.load_predictor(tmp_path / "peft")
    base = timm.create_model("test_vim", num_classes=5)
    base.load_state_dict({key: value for key, value in model.state_dict().items() if ".adapters." not in key})
    vimtune.load_peft(base.eval(), tmp_path / "peft")
    torch.testing.assert_close(base(images()), model(images()))


@pytest.mark.parametrize(
    ("method", "to", "sentence"),
    [
        ("lora", "vimtune", "Adapter (lora) of test_vim, trained on synthetic_flowers."),
        ("lora+bitfit", "vimtune", "Adapter (lora+bitfit) of test_vim, trained on synthetic_flowers."),
        ("lora", "peft", "Adapter (lora) of test_vim, trained on synthetic_flowers."),
        ("lora", "merged", "test_vim, trained on synthetic_flowers by lora and merged into plain weights."),
        ("full", "vimtune", "test_vim, all weights of which were trained on synthetic_flowers."),
        ("full", "merged", "test_vim, all weights of which were trained on synthetic_flowers."),
        ("linear", "vimtune", "Head for test_vim, trained on synthetic_flowers."),
        ("linear", "merged", "test_vim with a head trained on synthetic_flowers."),
    ],
)
def test_a_card_says_what_is_passed_on(tmp_path, method, to, sentence):
    make_adapter(tmp_path / "adapter.safetensors", peft=method)
    _, text = card_of(vimtune.convert(tmp_path / "adapter.safetensors", tmp_path / "flowers", to=to))
    said, _, _ = text.partition("## Training")  # The recipe has keys of this name.
    assert shown(sentence) in text
    words = [word.lower() for word in re.findall(r"\w+", said)]
    assert ("adapter" in words) == sentence.startswith("Adapter")


def test_the_card_of_the_format_of_peft_says_how_it_is_loaded(tmp_path):
    pytest.importorskip("peft", reason="HF peft is not installed")
    model = make_adapter(
        tmp_path / "adapter.safetensors", model="vim_nano_patch8_64.tiny_in200", pretrained=True, rank=2
    )
    folder = vimtune.convert(tmp_path / "adapter.safetensors", tmp_path / "loaded", to="peft")
    _, text = card_of(folder)
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    namespace: dict = {}
    exec(code.replace("OWNER/loaded", str(folder)), namespace)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        torch.testing.assert_close(namespace["model"].eval()(images), model(images), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"checkpoint": "weights.pth"},
            "# It was trained on weights of its own, 'weights.pth': vimtune",
        ),
        ({"pretrained": False}, "# It was trained on random weights, which are not to be had again"),
    ],
)
def test_the_card_of_the_format_of_peft_names_other_base_weights(values, said, tmp_path):
    make_adapter(tmp_path / "adapter.safetensors", rank=2)

    def change(info):
        info["extra"]["recipe"] |= values

    rewrite(tmp_path / "adapter.safetensors", change)
    code = code_for_base(vimtune.read_adapter_info(tmp_path / "adapter.safetensors"))
    assert said in code and "timm.create_model('test_vim', " in code and "pretrained=False" in code
    recipe = {"task": "text", "model": "state-spaces/mamba-130m-hf", **values}
    texts = vimtune.AdapterInfo("lora", {"lora": {}}, None, None, 0, "", {}, extra={"recipe": recipe})
    assert "AutoModelForCausalLM.from_pretrained('state-spaces/mamba-130m-hf')" in code_for_base(texts)


def shown(text: str) -> str:
    """A text as Markdown has it."""
    return text.replace("_", "\\_")


def test_the_hub_is_told_how_the_base_model_was_used(tmp_path):
    recipe = {"task": "arc_easy", "model": "state-spaces/mamba-130m-hf"}

    def relation(method, to):
        options = {name: {} for name in method.split("+")}
        info = vimtune.AdapterInfo(method, options, None, None, 0, "", {}, extra={"recipe": recipe})
        card = write_card(info, tmp_path / "adapter.safetensors", FORMATS.get(to), "", "me/arc")
        front = yaml.safe_load(card.split("---\n", 2)[1])
        assert front["base_model"] == "state-spaces/mamba-130m-hf"
        return front["base_model_relation"]

    assert (
        relation("lora", "vimtune") == relation("lora", "peft") == relation("linear", "vimtune") == "adapter"
    )
    assert (
        relation("lora", "merged") == relation("full", "merged") == relation("full", "vimtune") == "finetune"
    )


def test_the_card_of_a_run_has_its_scores(tmp_path, no_pictures, each_flower_is_painted_once):
    sizes = "dataset_kwargs={species: 2, train_per_species: 2, val_per_species: 1, test_per_species: 1}"
    settings = "--model test_vim --no-pretrained --epochs 1 --warmup-epochs 0 --num-workers 0 --device cpu"
    arguments = ["train", *settings.split(), "--dataset-kwargs", sizes.partition("=")[2]]
    assert cli.main([*arguments, "--output-dir", str(tmp_path / "run"), "--peft", "lora", "--rank", "2"]) == 0
    vimtune.convert(tmp_path / "run", tmp_path / "out")
    meta, text = card_of(tmp_path / "out")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    (entry,) = meta["model-index"]
    found = {metric["type"]: metric["value"] for part in entry["results"] for metric in part["metrics"]}
    assert found["accuracy"] == report["top1"]
    assert "| scored on | 2 images |" in text and f"| macro F1 | {report['macro_f1']:.2f} % |" in text
    assert f"| top-1 | {report['top1']:.2f} % |" in text and f"{report['trainable_parameters']:,} of" in text
    assert str(tmp_path) not in (tmp_path / "out" / "README.md").read_text()


def test_mistakes(tmp_path, made, hub, capsys):
    folder, _ = made
    hub.refuses = True
    with pytest.raises(HubError, match=r"upload to 'me/x' failed \(.*401.*\): check the name, the net"):
        vimtune.push(folder, "me/x")
    with pytest.raises(HubError, match="download of 'me/nothing' failed"):
        vimtune.pull("me/nothing", tmp_path / "out")
    hub.files["me/code"] = {"run.py": b"", "README.md": b"x"}
    with pytest.raises(ValueError, match=r"'me/code' has no adapter and no weights: expected adapter\.safe"):
        vimtune.pull("me/code", tmp_path / "out")
    for name in ("../x", "a/b/c", "", "https://x/y"):
        with pytest.raises(ValueError, match="expected the name of a user and of a model"):
            vimtune.pull(name, tmp_path / "out")
    make_adapter(tmp_path / "adapter.safetensors", peft="prodial", rank=2)
    assert cli.main(["convert", str(tmp_path), "-o", str(tmp_path / "out"), "--to", "peft"]) == 2
    assert "method 'prodial' does not exist in HF peft" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--model", "--checkpoint", "--tokenizer"])
def test_base_weights_that_nobody_reads_are_not_taken_in_silence(flag, tmp_path, made, capsys):
    folder, _ = made
    assert cli.main(["convert", str(folder), "-o", str(tmp_path / "out"), flag, "elsewhere"]) == 2
    assert f"{flag[2:]} = 'elsewhere': format 'vimtune' keeps the adapter alone" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_paths_of_this_computer(tmp_path):
    (tmp_path / "here").mkdir()
    given = {
        "a": ["/home/me/x.pth", "C:\\Users\\me\\x.pth", "~/x", "vim/tiny", "1/2", "in_proj", "a\nb/c", "/"],
        str(tmp_path / "here"): {"n": 3, "t": None},
    }
    assert without_paths(given) == {
        "a": ["x.pth", "x.pth", "x", "vim/tiny", "1/2", "in_proj", "a\nb/c", "/"],
        "here": {"n": 3, "t": None},
    }


def test_names_of_classes_are_no_paths(tmp_path):
    given = {
        "class_weights": {"/m/01g317": 2.0},
        "pretrained_cfg": {"label_names": ["/m/01g317", "C:\\x", "~/y"]},
        "id2label": {"0": "/m/01g317"},
        "column": "A: intact",
    }
    assert without_paths(given) == given
    names = ["A: intact", "B: broken", "/m/01g317", "~/y", 'say "x", z']
    make_adapter(tmp_path / "adapter.safetensors", rank=2)
    rewrite(tmp_path / "adapter.safetensors", lambda info: info.update(classes=names))
    vimtune.convert(tmp_path / "adapter.safetensors", tmp_path / "merged", to="merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text(encoding="utf-8"))
    assert config["pretrained_cfg"]["label_names"] == names
    assert vimtune.load_predictor(tmp_path / "merged").classes == names


def test_a_download_has_the_files_that_were_asked_for(tmp_path, made, hub):
    """The cache of the hub's client has those of earlier downloads as well."""
    folder, _ = made
    vimtune.push(folder, "me/flowers")
    vimtune.pull("me/flowers", tmp_path / "own")
    with pytest.raises(ValueError, match=r"has no adapter and no weights: expected adapter_config\.json"):
        vimtune.pull("me/flowers", tmp_path / "peft", to="peft")
    assert not (tmp_path / "peft").exists()


def test_errors_below_the_client_of_the_hub_are_one_line(tmp_path, made, hub, monkeypatch, capsys):
    folder, _ = made
    with socket.socket() as listening:  # There is no one at this port once it is given back.
        listening.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    assert cli.main(["push", str(folder), "me/flowers"]) == 2
    assert "the upload to 'me/flowers' failed (" in capsys.readouterr().err

    def interrupted(*_, **__):
        raise HfHubHTTPError.__bases__[0]("the line is dead")

    monkeypatch.setattr(hub_files, "snapshot_download", interrupted)
    with pytest.raises(HubError, match=r"download of 'me/flowers' failed \(the line is dead\)"):
        vimtune.pull("me/flowers", tmp_path / "out")
