"""The comparison of benchmarks/data_speed.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

import data_speed  # noqa: E402


def test_training_and_reading_are_timed(tmp_path, monkeypatch, capsys):
    output = tmp_path / "rows.json"
    options = (
        "--device cpu --model test_vim --method lora --dataset-kwargs species=4,train_per_species=1 "
        "--epochs 4 --batch-size 4 --num-workers 0 --steps 1 --caches device --jpegs 4"
    )
    monkeypatch.setattr(sys, "argv", ["data_speed.py", *options.split(), "--output", str(output)])
    data_speed.main()
    rows = json.loads(output.read_text())["rows"]
    assert [row["what"] for row in rows] == ["bare", "device", "decode", "all", "ours", "timm"]
    assert all(row["images_per_second"] > 0 for row in rows)
    assert rows[1]["start"] > 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(rows)
