"""Completions and merging with rules around scans, with kept states and without."""

import pytest
import torch

pytest.importorskip("transformers", minversion="5.21", reason="no transformers 5.21")

import vimtune
from vimtune import cli
from vimtune.adapters.rules.memba import MembraneRule
from vimtune.language import create_language_model
from vimtune.testing.methods import disturb

METHODS = ("affix", "lora+memba")


@pytest.fixture(scope="module", params=METHODS)
def adapter(request, tmp_path_factory):
    """An adapter file of a run on texts."""
    folder = tmp_path_factory.mktemp("texts")
    lines = [f'{{"prompt": "n {i} is ", "completion": "{i % 2}"}}' for i in range(24)]
    (folder / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "test.jsonl").write_text("\n".join(lines[:6]), encoding="utf-8")
    arguments = f"--task text --model mamba_tiny --peft {request.param} --epochs 1 --batch-size 8 --amp none"
    run = folder / "run"
    given = ["train", *arguments.split(), "--data-dir", str(folder), "--output-dir", str(run)]
    assert cli.main(given) == 0
    return request.param, run / "adapter.safetensors"


def test_completions_are_those_of_the_whole_text(adapter, capsys, monkeypatch):
    """A rule that mixes tokens and knows nothing of parts has each text read anew for each token."""
    method, path = adapter
    command = ["predict", "n 4 is ", "nn 3 is it", "--adapter", str(path), "--max-new-tokens", "3"]
    assert cli.main(command) == 0
    written = capsys.readouterr().out
    assert "n 4 is " in written
    if "memba" in method:
        whole_texts = []
        around = MembraneRule.around
        monkeypatch.delattr(MembraneRule, "around_part")
        monkeypatch.setattr(
            MembraneRule, "around", lambda rule, *given: whole_texts.append(0) or around(rule, *given)
        )
        assert cli.main(command) == 0
        assert whole_texts and capsys.readouterr().out == written


def test_a_merge_is_refused_by_the_name_of_the_rule(adapter, tmp_path, capsys):
    _, path = adapter
    assert cli.main(["merge", str(path), "-o", str(tmp_path / "merged")]) == 2
    assert "which no weight can express; nothing was merged" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_each_token_is_the_likeliest_after_the_whole_text():
    model = create_language_model("mamba_tiny", pretrained=False)
    disturb(vimtune.inject(model, "affix"), size=0.5)
    tokens = torch.tensor([[7, 3, 9]])
    written = model.eval().generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=4,
        do_sample=False,
        use_cache=False,
        pad_token_id=0,
    )
    with torch.no_grad():
        for length in range(3, written.shape[1]):
            logits = model(written[:, :length], use_cache=False).logits
            assert logits[0, -1].argmax() == written[0, length]
