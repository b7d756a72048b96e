"""Language models by name, from folders and files of both layouts; and what is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file, save_file
from text_runs import SETTINGS, write_data
from tiny_language import FAMILIES, original_files, slow_model, tokens

import vimtune.language as language
from vimtune import cli
from vimtune.language import create_language_model, language_models, load_tokenizer
from vimtune.language.mixers import FastMamba2Mixer, FastMambaMixer
from vimtune.recipe import Recipe
from vimtune.training import train

close = torch.testing.assert_close
family_wise = pytest.mark.parametrize("family", FAMILIES)


def same_model(found, expected):
    assert type(found) is type(expected) and not found.training
    mixers = [layer.mixer for layer in found.backbone.layers]
    assert all(isinstance(mixer, FastMambaMixer | FastMamba2Mixer) for mixer in mixers)
    assert all(p.requires_grad for p in found.parameters())
    close(found(tokens()).logits, expected(tokens()).logits, rtol=1e-4, atol=1e-5)


def edit_json(path, **changes):
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, **changes}))


def refused(message, name, **options):
    with pytest.raises(ValueError, match=message) as caught:
        create_language_model(str(name), **options)
    assert "\n" not in str(caught.value)


# --- the table


def test_the_table_needs_neither_torch_nor_transformers():
    code = "import sys\nfrom vimtune.language import language_models\nassert len(language_models()) == 12\n"
    code += "assert not {'torch', 'transformers', 'tokenizers'} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", list(language_models()))
def test_every_model_of_the_table_can_be_built(name):
    model = create_language_model(name, pretrained=False, device="meta")
    count = sum(parameter.numel() for parameter in model.parameters())
    stated = re.search(r"([\d.]+) (M|B) parameters", language_models()[name])
    if stated is not None:
        assert f"{count / {'M': 1e6, 'B': 1e9}[stated[2]]:.{'.' in stated[1]:d}f}" == stated[1]
    assert model.lm_head.weight is model.backbone.embeddings.weight


@pytest.mark.parametrize("name", ["mamba_tiny", "mamba2_tiny"])
def test_small_models_need_nothing(name):
    model, tokenizer = create_language_model(name, dtype=torch.bfloat16), load_tokenizer(name)
    assert model.dtype == model.config.dtype == torch.bfloat16
    language.check_tokenizer(tokenizer, model)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == model.config.eos_token_id == 256
    for text in ("Two  blanks, umlauts äöü\n\ttabs", "日本語 🙂", " leading"):
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text.encode()) and tokenizer.decode(ids) == text
    ids = torch.tensor([tokenizer("a").input_ids])
    assert model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3).shape[1] <= 4


def test_changes_of_the_configuration():
    model = create_language_model("mamba_tiny", num_hidden_layers=3, hidden_size=16, vocab_size=40)
    assert len(model.backbone.layers) == 3 and model.backbone.embeddings.weight.shape == (40, 16)
    refused("model mamba_tiny: mamba has no option 'num_layers'. Did you mean", "mamba_tiny", num_layers=3)
    refused("num_hidden_layers: .*less than or equal to 4096", "mamba_tiny", num_hidden_layers=10**9)
    refused("model mamba2_tiny is no configuration of mamba2: .*num_heads", "mamba2_tiny", num_heads=3)


# --- transformers' layout


@family_wise
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_folders_of_transformers(family, shard, tmp_path):
    expected = slow_model(family)
    expected.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "20KB")
    same_model(create_language_model(str(tmp_path)), expected)
    random = create_language_model(str(tmp_path), pretrained=False)
    assert not torch.equal(random.lm_head.weight, expected.lm_head.weight)


@family_wise
def test_untied_heads(family, tmp_path):
    expected = slow_model(family, tie_word_embeddings=False)
    expected.save_pretrained(tmp_path / "theirs")
    same_model(create_language_model(str(tmp_path / "theirs")), expected)
    original_files(expected, tmp_path / "original", tie_embeddings=False)
    same_model(create_language_model(str(tmp_path / "original")), expected)
    edit_json(tmp_path / "original" / "config.json", tie_embeddings=True)
    refused("lm_head.weight is not the embedding, which the configuration says it is", tmp_path / "original")


# --- the original layout


@family_wise
@pytest.mark.parametrize("weights", ["pytorch_model.bin", "model.safetensors", "other.pt"])
def test_original_checkpoints(family, weights, tmp_path):
    expected = slow_model(family)
    path = original_files(expected, tmp_path, weights)
    same_model(create_language_model(str(path)), expected)
    if path.stem != "other":
        same_model(create_language_model(str(tmp_path), backend="torch"), expected)
        half = create_language_model(str(tmp_path), dtype=torch.bfloat16)
        assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_original_checkpoints_in_other_dresses(tmp_path):
    """Nested, with prefixes of wrappers, without the tied head."""
    expected = slow_model("mamba")
    path = original_files(expected, tmp_path)
    state = torch.load(path, weights_only=True)
    del state["lm_head.weight"]
    torch.save({"epoch": 3, "model": {f"module.{name}": x for name, x in state.items()}}, path)
    same_model(create_language_model(str(path)), expected)


# --- what is refused


def test_unknown_names():
    refused("unknown language model 'mamba_tin'. Did you mean 'mamba_tiny'", "mamba_tin")
    refused("unknown language model 'no/such/folder'", "no/such/folder")
    for name in ("no/weights.bin", "no/weights.ckpt", "no/WEIGHTS.SAFETENSORS"):
        refused(f"unknown language model '{name}'", name)


def test_an_empty_name_is_not_the_working_folder(tmp_path, monkeypatch):
    load_tokenizer("mamba_tiny").save_pretrained(tmp_path)
    create_language_model("mamba_tiny").save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    create_language_model(".")
    refused("unknown language model ''", "")
    with pytest.raises(ValueError, match="tokenizer '': expected a model"):
        load_tokenizer("")


@pytest.mark.parametrize("content", ["{", "[]", '{"max_new_tokens": -3}'])
def test_a_broken_configuration_of_generation(content, tmp_path):
    slow_model("mamba").save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(content)
    refused(r"generation_config.json cannot be used \(.*\): correct or remove it", tmp_path)


def test_a_hub_that_cannot_be_reached(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = (
        r"could not be downloaded .*give a folder that has it \(--model FOLDER\), or train from random "
        r"weights \(vimtune train --no-pretrained; in Python pretrained=False\)"
    )
    refused(f"'state-spaces/mamba-130m-hf' {message}", "mamba-130m")
    refused(f"'nobody/nothing' {message}", "nobody/nothing")

    def interrupted(*_, **__):
        raise HfHubHTTPError.__bases__[0]("the line is dead")

    monkeypatch.setattr("vimtune.language.creation.snapshot_download", interrupted)
    refused(r"'nobody/nothing' could not be downloaded \(the line is dead\)", "nobody/nothing")


@pytest.mark.parametrize("layout", ["theirs", "original"])
def test_weights_that_do_not_fit(layout, tmp_path):
    model, path = slow_model("mamba"), tmp_path / "model.safetensors"
    model.save_pretrained(tmp_path) if layout == "theirs" else original_files(model, tmp_path, path.name)
    key = "backbone.embeddings.weight" if layout == "theirs" else "backbone.embedding.weight"
    good = load_file(path)

    def damaged(message, **changes):
        state = {name: x for name, x in {**good, **changes}.items() if x is not None}
        save_file({name: x.contiguous().clone() for name, x in state.items()}, path, {"format": "pt"})
        refused(message, tmp_path)

    a_log = "backbone.layers.0.mixer.A_log"
    damaged(f"does not fit its config.json: missing {a_log}", **{a_log: None})
    damaged("unexpected backbone.layers.0.mixer.A_b_log", **{"backbone.layers.0.mixer.A_b_log": good[a_log]})
    damaged(f"{a_log} holds values that are not finite", **{a_log: good[a_log] * torch.inf})
    heads = {"lm_head.weight": good[key][:-8]} if "lm_head.weight" in good else {}
    wrong = r"shapes backbone.embeddings.weight \(48, 32\) instead of \(56, 32\)"
    damaged(wrong, **{key: good[key][:-8]}, **heads)
    path.write_bytes(path.read_bytes()[:-100])
    refused("model.safetensors is truncated or not a safetensors file", tmp_path)
    path.unlink()
    refused("has no weights; expected model.safetensors or pytorch_model.bin", tmp_path)


def test_objects_in_a_checkpoint_are_not_run(tmp_path):
    path = original_files(slow_model("mamba"), tmp_path)
    torch.save({"weights": re.compile("x")}, path)
    refused("pytorch_model.bin contains objects that are not weights; refusing to unpickle it", tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "is for a model of type 'gpt2'; expected one of mamba, mamba2"),
        ({"model_type": None}, "has no model_type; expected one of mamba, mamba2"),
        ({"hidden_size": "many"}, "hidden_size: Input should be a valid integer"),
        ({"time_step_rank": "x"}, "time_step_rank: Input should be a valid integer or 'auto' .found 'x'"),
        ({"vocab_size": 0}, "vocab_size: .*greater than or equal to 1"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu': only mixers with 'silu' can be accelerated"),
    ],
)
def test_configurations_of_transformers(changes, message, tmp_path):
    slow_model("mamba").save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", **changes)
    refused(message, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn_layer_idx": [1]}, "has layers of attention"),
        ({"rms_norm": False}, "rms_norm: Input should be True"),
        ({"ssm_cfg": {"layer": "Mamba3"}}, "ssm_cfg.layer: Input should be 'Mamba1' or 'Mamba2'"),
        ({"ssm_cfg": {"layer": "Mamba2"}}, "does not fit its config.json: missing .*mixer.dt_bias"),
        ({"n_layer": 10**8}, "n_layer: Input should be less than or equal to 4096"),
        ({"vocab_size": 47}, r"embeddings.weight \(56, 32\) instead of \(48, 32\)"),
        ({"surprise": 1}, "surprise: Unexpected"),
    ],
)
def test_configurations_of_the_original_code(changes, message, tmp_path):
    original_files(slow_model("mamba"), tmp_path, **changes)
    refused(message, tmp_path)


def test_files_without_a_configuration(tmp_path):
    path = original_files(slow_model("mamba"), tmp_path)
    (tmp_path / "config.json").write_text("{")
    refused("config.json is not valid JSON", path)
    (tmp_path / "config.json").write_text('{"d_model": ' + "9" * 5000 + "}")
    refused("config.json is not valid JSON: a whole number has more than 4,300 digits", path)
    (tmp_path / "config.json").unlink()
    refused("config.json cannot be read .*the weights of a language model need it beside them", path)


def test_an_index_names_files_beside_it_alone(tmp_path):
    slow_model("mamba").save_pretrained(tmp_path, max_shard_size="20KB")
    edit_json(tmp_path / "model.safetensors.index.json", weight_map={"a": "../secret.safetensors"})
    refused(r"names the file '../secret.safetensors', which is not beside it", tmp_path)


# --- tokenizers


def test_tokenizers_of_folders_and_files(tmp_path):
    model = create_language_model("mamba_tiny")
    load_tokenizer("mamba_tiny").save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    text = "some text"
    for place in (tmp_path, tmp_path / "tokenizer.json", tmp_path / "model.safetensors"):
        tokenizer = load_tokenizer(str(place))
        assert tokenizer.decode(tokenizer(text).input_ids) == text and tokenizer.pad_token_id == 256


@pytest.mark.parametrize(("vocabulary", "fits"), [(256, False), (257, True), (1280, True), (1281, False)])
def test_a_tokenizer_of_another_model_is_refused(vocabulary, fits):
    model = create_language_model("mamba_tiny", vocab_size=vocabulary)
    tokenizer = load_tokenizer("mamba_tiny")
    for module in (model, language.pooled_classifier(model, 2)):
        if fits:
            language.check_tokenizer(tokenizer, module)
        else:
            with pytest.raises(ValueError, match=rf"has 257 tokens and .* {vocabulary:,}: give"):
                language.check_tokenizer(tokenizer, module)
    tokenizer.eos_token = None
    if fits:
        with pytest.raises(ValueError, match="no token for the end of a text"):
            language.check_tokenizer(tokenizer, model)


def test_tokenizers_that_cannot_be_used(tmp_path):
    original_files(slow_model("mamba"), tmp_path)
    with pytest.raises(ValueError, match=r"has no tokenizer.json; .* is EleutherAI/gpt-neox-20b"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(ValueError, match=r"tokenizer '/no/where': expected .* a folder or file that exists"):
        load_tokenizer("/no/where")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer '.*tokenizer.json' cannot be loaded"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))


# --- without transformers


@pytest.mark.parametrize("found", [None, "4.57.6", "5.20.2"])
def test_what_to_install(found, monkeypatch):
    def version(name):
        if found is None:
            raise language.importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(language.importlib.metadata, "version", version)
    said = "it is not installed" if found is None else f"{found} is installed"
    expected = f'need transformers 5.21 or newer, and {said}: pip install "vimtune[text]"'
    with pytest.raises(ValueError, match=re.escape(expected)):
        language.create_language_model  # noqa: B018 - loading it is the test


def test_every_command_says_what_to_install(tmp_path, monkeypatch, capsys):
    """Before it imports anything of transformers: `require_transformers` stands first in every way in."""
    data = write_data("text", tmp_path / "data")
    values = {**SETTINGS, "task": "text", "data_dir": str(data), "pictures": False}
    train(Recipe(**values, output_dir=str(tmp_path / "run")))
    monkeypatch.setattr(language, "MIN_TRANSFORMERS", (999, 0))
    monkeypatch.chdir(tmp_path)
    base = "--task text --data-dir data --model mamba_tiny"
    capsys.readouterr()
    for line in (
        f"train {base} --output-dir run2",
        f"evaluate {base}",
        "evaluate --adapter run --data-dir data",
        "predict words --adapter run",
        "merge run -o merged",
        "convert run -o converted --to peft",
        "convert run -o converted --to merged",
        "combine run run -o sum.safetensors",
        "analyze run -o page.html",
    ):
        assert cli.main(line.split()) == 2
        (message,) = [said for said in capsys.readouterr().err.splitlines() if said.startswith("error: ")]
        assert message.startswith("error: language models need transformers 999.0 or newer, and "), line


def test_the_extra_asks_for_what_the_message_says():
    import importlib.metadata

    asked = [line for line in importlib.metadata.requires("vimtune") if line.startswith("transformers")]
    if not asked:
        pytest.skip("the installed metadata of vimtune is older than the extra")
    lowest = ".".join(map(str, language.MIN_TRANSFORMERS))
    assert f">={lowest}" in asked[0] and 'extra == "text"' in asked[0]


def test_names_of_the_room():
    for name in language.__all__:
        assert getattr(language, name) is not None and name in dir(language)
    with pytest.raises(AttributeError, match="has no attribute 'create_languge_model'"):
        language.create_languge_model  # noqa: B018 - loading it is the test
