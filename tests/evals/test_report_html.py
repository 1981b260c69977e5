import base64
from html.parser import HTMLParser

import pytest

from nano_think.evals.bootstrap import Interval
from nano_think.evals.report import Report, Table

VOID = {"meta", "img", "br", "hr", "link"}


class Page(HTMLParser):
    """Every tag closed in order, the cells of every table, images, links."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tables, self.images, self.links, self.tags = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        values = dict(attributes)
        self.links += [values[name] for name in ("href", "src") if name in values]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "img":
            self.images.append(base64.b64decode(values["src"].split("base64,")[1]))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data


@pytest.fixture
def report(tmp_path):
    figure = tmp_path / "f.png"
    figure.write_bytes(b"\x89PNG and more")
    rows = [["a_b|c", Interval(1.0, 0.5, 1.5, 3)], ["<b>2 < 3</b>", None]]
    report = Report("Losses & <gains>").heading("First part").text("See <https://a.example>, *really*.")
    report.table(Table(["model", "loss [nats]"], rows, title="T", formats=["", ".1f"]))
    return report.figure(figure, 'A "quoted" `caption`').heading("Last & least").text("```\nmake study\n```")


def test_page_is_well_formed_and_holds_tables_and_figures(report):
    page = Page(report.html())
    assert page.tables == [
        [["model", "loss [nats]"], ["a_b|c", "1.0 [0.5, 1.5]"], ["<b>2 < 3</b>", "–"]],
    ]
    assert page.images == [b"\x89PNG and more"]
    assert "Losses &amp; &lt;gains&gt;" in report.html()
    assert 'alt="A &quot;quoted&quot; caption"' in report.html()
    assert "<em>really</em>" in report.html()
    assert "<pre><code>make study\n</code></pre>" in report.html()


def test_page_needs_no_network_and_no_script(report):
    page = Page(report.html())
    assert all(link.startswith(("data:image/png;base64,", "#part-")) for link in page.links)
    assert [link for link in page.links if link.startswith("#")] == ["#part-1", "#part-2"]
    assert not {"script", "link", "iframe", "b"} & set(page.tags)
    assert "@import" not in report.html()
    assert "url(" not in report.html()


def test_links_in_notes_stay_text():
    text = Report("T").text("[x](https://a.example) ![y](https://b.example/c.png) <img src=z>").html()
    assert Page(text).links == []


def test_missing_figure_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.png"):
        Report("T").figure(tmp_path / "no.png", "x").html()
