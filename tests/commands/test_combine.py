"""combine: adapter files that are sums of others, from Python and on the command line."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from adapter_files import make_adapter, rewrite, write_photos

import vimtune
from vimtune import cli
from vimtune.commands.combine import combine_files


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two runs from the same base weights, and their models."""
    folder = tmp_path_factory.mktemp("made")
    models = []
    for number in (1, 2):
        (folder / f"run{number}").mkdir()
        models.append(
            make_adapter(folder / f"run{number}" / "adapter.safetensors", scale=0.05 * number, rank=2)
        )
    return folder, models


def logits(path):
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    return vimtune.load_predictor(path).logits(images)


def test_the_average_of_two_runs(tmp_path, made, capsys):
    folder, models = made
    output = tmp_path / "soup.safetensors"
    assert cli.main(["combine", str(folder / "run1"), str(folder / "run2"), "-o", str(output)]) == 0
    assert "2 adapters combined (exact) into" in capsys.readouterr().out
    info = vimtune.read_adapter_info(output)
    assert info.method == "lora" and info.options["lora"]["rank"] == 4 and len(info.classes) == 5
    assert [part["weight"] for part in info.extra["combined"]["adapters"]] == [0.5, 0.5]
    assert str(folder) not in json.dumps(info.extra)
    states = [vimtune.merge(model).state_dict() for model in models]
    expected = models[0]
    expected.load_state_dict({key: (states[0][key] + states[1][key]) / 2 for key in states[0]})
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(logits(output), expected(images), rtol=1e-4, atol=1e-4)
    photos = [str(path) for path in write_photos(tmp_path / "photos")]
    assert cli.main(["predict", *photos, "--adapter", str(output)]) == 0


def test_an_adapter_minus_itself_is_its_base_with_its_head(tmp_path, made):
    folder, _ = made
    run = folder / "run1"
    shutil.copytree(run, tmp_path / "again")
    output = tmp_path / "none.safetensors"
    info = combine_files([run, tmp_path / "again"], output, weights=[1, -1], head=run)
    assert info.method == "lora" and (logits(output) - logits(run)).abs().max() > 1e-3


def test_the_refusal_of_other_base_weights_names_the_flag(tmp_path, made, capsys):
    make_adapter(tmp_path / "other.safetensors", rank=2, seed=5)
    given = [
        str(made[0] / "run1"),
        str(tmp_path / "other.safetensors"),
        "-o",
        str(tmp_path / "soup.safetensors"),
    ]
    assert cli.main(["combine", *given]) == 2
    assert "(on the command line: --checkpoint, or --force)" in capsys.readouterr().err
    assert cli.main(["combine", *given, "--force"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{0}/run1", "{0}/run2", "--weights", "1"], "1 weights for 2 adapters"),
        (["{0}/run1", "{0}/run2", "--weights", "1,x"], "one for each adapter"),
        (["{0}/run1", "{0}/run2", "--weights", "1,1"], "do not average: the coefficients sum to 2"),
        (["{0}/run1", "{0}/run2", "--head", "{0}/run3/adapter.safetensors"], "expected one of the adapters"),
        (["{0}/run1", "{1}/other"], "has other classes than"),
    ],
)
def test_mistakes(tmp_path, made, capsys, arguments, message):
    folder, _ = made
    shutil.copytree(folder / "run2", tmp_path / "other")
    rewrite(tmp_path / "other" / "adapter.safetensors", lambda info: info["classes"].reverse())
    output = tmp_path / "soup.safetensors"
    given = [argument.format(folder, tmp_path) for argument in arguments]
    assert cli.main(["combine", *given, "-o", str(output)]) == 2
    assert message in capsys.readouterr().err and not output.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--weights=1,-0.5"],
            "the heads of 'ours', 'other' do not average: the coefficients sum to 0.5 and not to 1. Say "
            "whose head the result has, such as head='ours' (on the command line: --head)",
        ),
        (
            ["--how", "tensors"],
            "adapters 'ours' (lora) and 'other' (bitfit) do not have the same method, options and places, so "
            "that their tensors do not average: how='exact' (on the command line: --how exact) sums",
        ),
        (["--weights=1,1", "--how", "tensors"], "give such ones; how='exact' (on the command line: --how"),
    ],
)
def test_messages_name_adapters_as_the_user_does(tmp_path, made, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    shutil.copy(made[0] / "run1" / "adapter.safetensors", "ours")
    make_adapter(tmp_path / "other", peft="bitfit")
    given = ["combine", "ours", "other", "-o", "sum.safetensors"]
    assert cli.main([*given, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert cli.main([*given, "--weights=1,-0.5", "--head", "ours"]) == 0


def test_a_coefficient_that_is_no_number_is_that_of_a_file(tmp_path, made):
    run = made[0] / "run1"
    with pytest.raises(ValueError, match=r"the coefficient of '.*run1.*' is nan: expected a finite number"):
        combine_files([run], tmp_path / "sum.safetensors", weights=[float("nan")])
