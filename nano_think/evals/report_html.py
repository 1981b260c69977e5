"""Reports as one HTML file that needs nothing else: figures inside, no script, no network.

The `markdown` package (a dependency of tensorboard as well) converts text and tables. Raw HTML and links to
addresses in the text are shown as they are typed, so that a note of a measurement can never become markup.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nano_think.evals.report import Table

# Readable on a phone and on paper; colours follow the reader's light or dark setting.
_STYLE = """
:root { color-scheme: light dark; --text: #1b1b1f; --page: #fdfdfc; --line: #d5d5d8; --soft: #f1f1f0;
  --link: #0b5aa5 }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e4e8; --page: #18181b; --line: #3f3f46; --soft: #242428; --link: #7fb8f0 }
}
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 62rem; color: var(--text); background: var(--page);
  font: 16px/1.55 system-ui, sans-serif }
h1 { line-height: 1.2 } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem }
p, li { max-width: 46rem } a { color: var(--link) }
nav ul { columns: 16rem; padding-left: 1.1rem }
code, pre { font: .88em/1.45 ui-monospace, monospace; background: var(--soft); border-radius: 4px }
code { padding: .1em .3em; overflow-wrap: anywhere }
pre { padding: .7rem; overflow-x: auto } pre code { padding: 0 }
.table { overflow-x: auto; margin: 1rem 0 1.6rem } .table p { margin: 0 0 .4rem }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums }
th, td { padding: .28rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top }
th { background: var(--soft); text-align: left } tbody tr:hover { background: var(--soft) }
figure { margin: 1.5rem 0 } figure img { max-width: 100%; height: auto; background: #fff; border-radius: 4px }
figcaption { font-size: .9rem; max-width: 46rem }
"""


def html_page(title: str, parts: Sequence[str | Table | tuple[Path, str]]) -> str:
    """The parts of a Report as a page; headings of level 2 become its list of contents.

    Raises:
        FileNotFoundError: a figure does not exist.
    """
    converter = _converter()
    blocks: list[str] = []
    contents: list[tuple[str, str]] = []
    for part in parts:
        if isinstance(part, tuple):
            blocks.append(_figure(*part))
        elif not isinstance(part, str):
            blocks.append(f'<div class="table">\n{converter.reset().convert(part.markdown())}\n</div>')
        elif part.startswith("## "):
            anchor = f"part-{len(contents) + 1}"
            contents.append((anchor, part[3:]))
            blocks.append(f'<h2 id="{anchor}">{html.escape(part[3:])}</h2>')
        else:
            blocks.append(converter.reset().convert(part))
    links = "\n".join(f'<li><a href="#{anchor}">{html.escape(text)}</a></li>' for anchor, text in contents)
    navigation = f'<nav aria-label="Contents">\n<ul>\n{links}\n</ul>\n</nav>\n' if contents else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n{navigation}" + "\n".join(blocks) + "\n</body>\n</html>\n"
    )


def _converter() -> Any:
    import markdown

    converter = markdown.Markdown(extensions=["tables", "fenced_code", "sane_lists"])
    converter.preprocessors.deregister("html_block")
    for pattern in ("html", "autolink", "automail", "link", "image_link"):
        converter.inlinePatterns.deregister(pattern)
    return converter


def _figure(path: Path, caption: str) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"The report's figure {path} does not exist: draw it first.")
    kind = {".svg": "svg+xml", ".jpg": "jpeg"}.get(path.suffix, path.suffix[1:])
    data = base64.b64encode(path.read_bytes()).decode()
    text = html.escape(re.sub(r"[*`]", "", caption))
    image = f'<img src="data:image/{kind};base64,{data}" alt="{text}">'
    return f"<figure>\n{image}\n<figcaption>{text}</figcaption>\n</figure>"
