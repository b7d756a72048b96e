"""Pages: whatever the texts say, a page shows them and asks for nothing."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

from PIL import Image

from vimtune.pages.page import PHOTO_SIDE, Page
from vimtune.pages.section import Photo, Picture, Section, Table

EVIL = '<script>alert(1)</script> \x1b[31m & "quoted"'


def section(**parts: object) -> Section:
    return Section(title=EVIL, explanation=EVIL, findings=[EVIL], numbers={}, **parts)


def test_texts_stay_texts() -> None:
    photo = Photo(lambda: Image.new("RGB", (400, 200), "red"), [EVIL, EVIL], EVIL)
    own = section(photos=[photo], tables=[Table(EVIL, [EVIL], [[EVIL]])])
    page = Page(EVIL, EVIL, [(EVIL, EVIL)], [own], {EVIL: EVIL}).to_html()
    assert "<script" not in page and "\x1b" not in page and "default-src 'none'" in page
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:image/)""", page)
    # A text with quotation marks ends no attribute.
    assert 'title="&lt;script' in page and '&quot;quoted&quot;"' in page


def test_photographs_are_reduced() -> None:
    page = Page(
        "c", "t", [], [section(photos=[Photo(lambda: Image.new("RGB", (400, 200)), [], "")])]
    ).to_html()
    (encoded,) = re.findall(r"data:image/jpeg;base64,([^\"]+)", page)
    assert Image.open(io.BytesIO(base64.b64decode(encoded))).size == (PHOTO_SIDE, PHOTO_SIDE // 2)


def test_a_picture_may_be_a_file_that_is_not_there(tmp_path: Path) -> None:
    Image.new("RGB", (3, 3)).save(tmp_path / "there.png")
    pictures = [Picture("there", tmp_path / "there.png"), Picture("missing", tmp_path / "missing.png")]
    page = Page("c", "t", [], [section(pictures=pictures)]).to_html()
    assert page.count("data:image/png") == 1 and "missing" not in page and "there</figcaption>" in page
