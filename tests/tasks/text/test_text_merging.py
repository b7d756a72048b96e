"""merge for texts: a folder that plain transformers loads, and that computes what base and adapter do."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", minversion="5.21", reason="no transformers 5.21")

from test_text_predictor import error, make_adapter
from text_files import write_lines
from text_runs import PROMPTED, write_data

import vimtune
from vimtune import adapters, cli
from vimtune.language import create_language_model, load_tokenizer


def merge(run, output, *flags):
    return cli.main(["merge", str(run), "-o", str(output), "--device", "cpu", *map(str, flags)])


@pytest.fixture
def run(tmp_path):
    """The folder of a run on prompts, with ProDiaL on both projectors."""
    file = write_lines(tmp_path / "train.jsonl", [PROMPTED] * 4)
    make_adapter(tmp_path / "run", task="text", train_file=str(file), peft="prodial", targets="both")
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("family", "method", "rank"),
    [("mamba_tiny", "lora", 2), ("mamba2_tiny", "lora", 2), ("mamba_tiny", "additional_scan", None)],
)
def test_a_folder_that_transformers_loads(family, method, rank, tmp_path, capsys):
    data = write_data("arc_easy", tmp_path / "data")
    job = make_adapter(
        tmp_path / "run", task="arc_easy", model=family, data_dir=str(data), peft=method, rank=rank
    )
    assert merge(tmp_path / "run", tmp_path / "merged") == 0
    printed = capsys.readouterr().out
    assert f"{family} with {method} merged into" in printed
    assert "on 2 x 48 random tokens" in printed
    code = "\n".join(line.strip() for line in printed.split("load it with:")[1].splitlines())
    found = {}
    exec(code, found)
    plain = found["model"].eval()
    assert type(plain).__module__.startswith("transformers.")
    ids = torch.randint(0, 256, (2, 20))
    scorer = job.model.eval()
    expected = scorer.lm_head(scorer.backbone(ids, use_cache=False)[0])
    torch.testing.assert_close(plain(ids).logits, expected, rtol=1e-3, atol=1e-4)
    tokenizer = load_tokenizer(str(tmp_path / "merged"))
    assert tokenizer("Two and two")["input_ids"] == load_tokenizer(family)("Two and two")["input_ids"]
    # It is a base for training like any other.
    again = create_language_model(str(tmp_path / "merged"))
    vimtune.inject(again, "lora", rank=2)


def test_a_folder_of_half_the_size(run, tmp_path):
    folders = {precision: tmp_path / precision for precision in ("fp32", "fp16")}
    for precision, folder in folders.items():
        assert merge(run, folder, "--precision", precision) == 0
    whole, half = (create_language_model(str(folder)).state_dict() for folder in folders.values())
    assert whole.keys() == half.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(half[name].float(), tensor, rtol=1e-3, atol=1e-6)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in folders.values()]
    assert sizes[1] < 0.6 * sizes[0]


def test_a_place_that_is_taken_and_one_that_cannot_be(run, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    assert merge(run, tmp_path / "full") == 2
    assert "full' : it is there already" in error(capsys).replace("':", "' :")
    assert merge(run, tmp_path / "no" / "folder") == 2
    assert "is not a writable folder" in error(capsys)
    (tmp_path / "empty").mkdir()
    assert merge(run, tmp_path / "empty") == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"train.jsonl", "run", "full", "empty"}


def test_a_merge_that_changes_the_model_leaves_no_folder(run, tmp_path, capsys, monkeypatch):
    merge_model = vimtune.merge

    def wrong(model):
        merge_model(model).lm_head.weight.data.mul_(1.5)
        return model

    monkeypatch.setattr(adapters, "merge", wrong)
    assert merge(run, tmp_path / "merged") == 2
    assert "the merged model differs: maximum logit error" in error(capsys)
    assert {path.name for path in tmp_path.iterdir()} == {"train.jsonl", "run"}


def test_a_classification_head_has_no_place_there(tmp_path, capsys):
    data = write_data("text", tmp_path / "data")
    make_adapter(tmp_path / "run", task="text", head="classifier", data_dir=str(data))
    assert merge(tmp_path / "run", tmp_path / "merged") == 2
    assert "has a classification head, for which transformers' language models have no place" in error(capsys)
    assert not (tmp_path / "merged").exists()
