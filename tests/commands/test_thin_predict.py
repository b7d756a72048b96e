"""Predictions need no library for training, plots or augmentation, and from Python none for terminals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from adapter_files import make_adapter, write_photos

UNNEEDED = {
    "albumentations",
    "albucore",
    "cv2",
    "scipy",
    "tensorboard",
    "matplotlib",
    "optuna",
    "transformers",
}
"""Packages that the thin installation in README leaves out, or that come with one that it leaves out."""

SCRIPT = """
import sys

class Missing:
    names = set({names!r}) | {{"rich"}}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
import vimtune

predictor = vimtune.load_predictor("adapter.safetensors", backend="torch")
print([prediction.classes[0] for prediction in predictor.predict(sys.argv[1:])])

Missing.names.discard("rich")  # The command prints its table with it.
from vimtune import cli

code = cli.main(["predict", *sys.argv[1:], "--adapter", "adapter.safetensors", "-o", "found.json"])
print(sorted(Missing.names & {{name.partition(".")[0] for name in sys.modules}}))
sys.exit(code)
"""


def test_predictions_do_without_the_libraries_of_training(tmp_path):
    make_adapter(tmp_path / "adapter.safetensors")
    photos = [str(path) for path in write_photos(tmp_path / "photos")]
    script = SCRIPT.format(names=sorted(UNNEEDED))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", script, *photos],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    by_python, *_, loaded = done.stdout.splitlines()
    found = json.loads((tmp_path / "found.json").read_text())
    assert by_python == str([each["predictions"][0]["class"] for each in found])
    assert loaded == "[]"
