"""What becomes of a file or folder that is there where a command writes its result."""

from __future__ import annotations

import pytest
from adapter_files import make_adapter, write_photos

import vimtune
from vimtune import cli
from vimtune.output import OutputError


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working directory, with a run, another one, photos and their vectors."""
    monkeypatch.chdir(tmp_path)
    for name in ("run", "other"):
        (tmp_path / name).mkdir()
        make_adapter(tmp_path / name / "adapter.safetensors", rank=2)
        (tmp_path / name / "checkpoint.safetensors").write_text("a state")
        (tmp_path / name / "report.html").write_text("a page")
    write_photos(tmp_path / "photos")
    assert cli.main(["embed", "photos", "--adapter", "run", "-o", "vectors.npz"]) == 0
    return tmp_path


COMMANDS = {
    "predict": ["predict", "photos", "--adapter", "run", "-o"],
    "vectors": ["embed", "photos", "--adapter", "run", "-o"],
    "neighbours": ["embed", "photos", "--adapter", "run", "--among", "vectors.npz", "-o"],
    "evaluate": ["evaluate", "--adapter", "run", "-o"],
    "mistakes": ["evaluate", "--adapter", "run", "--mistakes"],
    "analyze": ["analyze", "run", "-o"],
    "merge": ["merge", "run", "-o"],
    "combine": ["combine", "run", "run", "-o"],
    "export": ["export", "run", "-o"],
}
"""Commands up to the name of their result."""


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("predict", "report.json"),
        ("neighbours", "report.json"),
        ("evaluate", "report.html"),
        ("evaluate", "report.json"),
        ("analyze", "report.html"),
        ("merge", "adapter.safetensors"),
        ("merge", "checkpoint.safetensors"),
        ("combine", "adapter.safetensors"),
    ],
)
def test_what_a_run_has_trained_is_not_replaced(here, capsys, command, name):
    """It was replaced without a word, and a table with the name of a report made a run count as finished."""
    path = here / "other" / name
    before = path.read_bytes() if path.exists() else None
    assert cli.main([*COMMANDS[command], str(path)]) == 2
    assert "keeps a file of its own by this name" in capsys.readouterr().err
    assert (path.read_bytes() if path.exists() else None) == before


def test_other_names_for_the_file_of_a_run(here, capsys):
    (here / "other" / "link.html").symlink_to("report.html")
    assert cli.main([*COMMANDS["evaluate"], "other/link.html"]) == 2
    assert "keeps a file of its own" in capsys.readouterr().err
    with pytest.raises(OutputError, match="keeps a file of its own"):
        vimtune.merge_to_file("run", "other/adapter.safetensors")


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("predict", "out.csv"),
        ("vectors", "out.npz"),
        ("neighbours", "out.json"),
        ("merge", "out.safetensors"),
        ("combine", "out.safetensors"),
    ],
)
@pytest.mark.parametrize("folder", [".", "run"])
def test_an_earlier_result_is_replaced(here, command, name, folder):
    """A script may give its commands again, also one whose results lie in the folder of the run."""
    path = here / folder / name
    path.write_text("an earlier result")
    for _ in range(2):
        assert cli.main([*COMMANDS[command], str(path)]) == 0
    assert path.read_bytes() != b"an earlier result"
    assert not [each for each in path.parent.iterdir() if each.name.startswith(f".{name}")]


def test_a_folder_has_to_be_new(here, capsys):
    for name, expected in (("passed-on", 0), ("passed-on", 2), ("other", 2)):
        assert cli.main(["convert", "run", "-o", name]) == expected
    assert "it is there already; give the name of a new folder" in capsys.readouterr().err
    assert (here / "other" / "report.html").read_text() == "a page"


@pytest.mark.parametrize("name", ["lora.safetensors", "model.PTH", "last.ckpt", "best.pth.tar", "graph.pt2"])
def test_a_folder_is_not_called_like_a_file_of_weights(here, capsys, name):
    """Who gives such a name expects a file, and got a folder without a word."""
    assert cli.main(["convert", "run", "-o", name]) == 2
    told = capsys.readouterr().err
    assert f"cannot write {name!r}: a folder with several files is made; give it a name without ." in told
    assert not (here / name).exists()
    (here / name).mkdir()  # This one is meant.
    assert cli.main(["convert", "run", "-o", name]) == 0


def test_two_results_by_one_name(here, capsys):
    assert cli.main([*COMMANDS["evaluate"], "out.csv", "--mistakes", "out.csv"]) == 2
    assert "--output and --mistakes are both 'out.csv'" in capsys.readouterr().err
