"""The report page: escaping, self-containedness, pictures that read back."""

import base64
import re

import cv2
import numpy as np

from alimm.report import Page, Raw, curves, picture, table


def test_text_is_escaped_and_html_is_not():
    html = table(["<a>", "b"], [["x & y", Raw("<b>1</b>")], ["2", Raw('<td class="c">3</td>')]], strong=[1])
    assert "<th>&lt;a&gt;</th>" in html
    assert "<td>x &amp; y</td><td><b>1</b></td>" in html
    assert '<tr class=strong><td>2</td><td class="c">3</td></tr>' in html


def test_a_picture_reads_back():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    html = picture(pixels, 'a "quoted" <name>')
    assert "&quot;quoted&quot; &lt;name&gt;" in html
    png = base64.b64decode(re.search(r"base64,([^\"]+)", html).group(1))
    assert np.array_equal(cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)[..., ::-1], pixels)


def test_the_page_asks_nothing_of_the_network(tmp_path):
    page = Page("A < B", "lead")
    page.section("Plot", "text <i>", curves({"loss": {"a": ([1, 2], [3.0, 4.0]), "b": ([1, 2], [1.0, 2.0])}}))
    page.section("Pictures", picture(np.zeros((4, 4, 3), np.uint8)))
    page.write(tmp_path / "new" / "report.html")
    html = (tmp_path / "new" / "report.html").read_text()
    assert "<title>A &lt; B</title>" in html
    assert "text &lt;i&gt;" in html
    assert "<svg" in html
    assert not re.search(r"<(script|link|iframe)|(src|href)=\"https?:|url\(http", html)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["report.html"]
