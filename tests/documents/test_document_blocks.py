"""No block of a document is overlooked, and what documents name exists."""

from __future__ import annotations

import re
import sys

import pytest
from document_blocks import BLOCKS, DOCUMENTS, ROOT, blocks_of, read_blocks

from vimtune.strict_yaml import parse_yaml

TESTED = {
    "": "test_document_commands.py",
    "python": "test_document_python.py, test_contributing.py",
    "yaml": "test_yaml_is_read",
    "toml": "test_toml_is_read",
    "text": "nothing: it shows names and contents of files",
}
"""The languages of blocks, and what tests them. Other names would be found nowhere."""


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_block_is_one_that_is_tested(block):
    assert block.body.strip()
    if block.not_run is None:
        assert block.language in TESTED
    else:
        assert len(block.not_run.split()) > 1, "a reason is a sentence"


def test_all_documents_are_read():
    pages = {block.page for block in BLOCKS}
    assert {"README.md", "CONTRIBUTING.md", "configs/README.md", "docs/extend.md"} <= pages
    fences = sum(len(re.findall(r"^\s*```", text, re.M)) for text in DOCUMENTS.values())
    assert fences == 2 * len(BLOCKS)


def test_blocks_may_be_nested_and_left_out_for_a_reason():
    text = """\
- A list:

  ```python
  if x:
      y
  ```

<!-- not run: it takes a day -->
````
```
a line
```
````
"""
    first, second = read_blocks("page.md", text)
    assert (first.line, first.language, first.body, first.not_run) == (3, "python", "if x:\n    y\n", None)
    assert (second.language, second.body, second.not_run) == ("", "```\na line\n```\n", "it takes a day")


@pytest.mark.parametrize(
    "text", ["```\na\n", "<!-- not run: a day -->\n\n```\na\n```\n", "<!-- not run: a day -->\n"]
)
def test_what_would_hide_a_block_is_refused(text):
    with pytest.raises(ValueError, match=r"page\.md:"):
        read_blocks("page.md", text)


@pytest.mark.parametrize("block", blocks_of("yaml"), ids=str)
def test_yaml_is_read(block):
    assert parse_yaml(block.body)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 reads no TOML")
@pytest.mark.parametrize("block", blocks_of("toml"), ids=str)
def test_toml_is_read(block):
    import tomllib

    assert tomllib.loads(block.body)


def test_links_and_pictures_of_the_readme_are_there():
    targets = re.findall(r"\]\(([^)]+)\)", DOCUMENTS["README.md"])
    assert len(targets) > 20
    for target in targets:
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_paths_that_are_named_exist():
    found = {
        (page, path)
        for page, text in DOCUMENTS.items()
        for path in re.findall(r"`((?:vimtune|tests|configs|benchmarks|notebooks|\.ci)/[\w/.*]*)`", text)
    }
    assert len(found) > 30
    for page, path in sorted(found):
        assert list(ROOT.glob(path)) or path.endswith("/gain.py"), f"{page}: {path}"
