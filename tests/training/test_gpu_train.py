"""The trainer's benchmark, on a run that a CPU does in a second."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import gpu_train


def test_all_rows_are_timed_and_train_the_same(monkeypatch, tmp_path, capsys):
    output = tmp_path / "rows.json"
    options = ["--device", "cpu", "--cases", "test_vim:4", "--steps", "8", "--amp", "none", "--eager"]
    monkeypatch.setattr(sys, "argv", ["gpu_train.py", *options, "--output", str(output)])
    gpu_train.main()
    rows = json.loads(output.read_text())["rows"]
    assert [row["what"] for row in rows] == ["bare", "resident", "copied", "resident", "copied"]
    assert all(row["step_ms"] > 0 and row["warnings"] == [] for row in rows)
    assert len({row["last_loss"] for row in rows[1:]}) == 1
    # The bare step has taken one more step, at a constant rate and without clipping.
    assert rows[0]["last_loss"] == pytest.approx(rows[1]["last_loss"], abs=0.3)
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 2 + len(rows) and float(table[2].split()[6]) == 0.0
