"""All results in one HTML file that needs no other: pages, tables and figures of benchmarks/results.

    python benchmarks/report.py --output report.html [--results benchmarks/results]

Every page says by which command, on which hardware and when it was made; figures are in the file as they are.
"""

from __future__ import annotations

import argparse
import base64
import html
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline import ConfigError, __version__

RESULTS = Path(__file__).with_name("results")
FIRST = ("accuracy", "local-to-global", "probe", "cka", "tsne", "maps", "memory")
"""Names that begin those of the pages at the top; the others follow by name."""
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #33373d; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; } h2 { border-top: 1px solid #d9dce1; padding-top: 1.5rem; margin-top: 3rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #e6e8ec; text-align: left; vertical-align: top; }
th { background: #f4f5f7; position: sticky; top: 0; } code, pre { background: #f4f5f7; font-size: 13px; }
pre { padding: .6rem; overflow-x: auto; } img { max-width: 100%; } nav a { margin-right: 1rem; }
"""


@dataclass(frozen=True)
class Page:
    """One Markdown page of results, and how it is called in links."""

    name: str
    title: str
    body: str


def report(results: Path) -> str:
    """The whole file.

    Raises:
        ConfigError: there is no page.
    """
    files = sorted(results.glob("*.md"), key=lambda path: (_place(path.stem), path.stem))
    if not files:
        raise ConfigError(f"--results {results}: no page (*.md) in it; a benchmark writes one with --output")
    pages = [_page(path) for path in files]
    shown = {path for file in files for path in _pictures(file)}
    rest = sorted(path for path in results.glob("*.png") if path not in shown)
    links = " ".join(f'<a href="#{page.name}">{html.escape(page.title)} ({page.name})</a><br>' for page in pages)
    parts = [
        "<!doctype html>", '<html lang="en">', "<head>", '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">', "<title>localpipe: results</title>",
        f"<style>{STYLE}</style>", "</head>", "<body>", f"<h1>localpipe {__version__}: results</h1>",
        f"<nav>{links}</nav>",
    ]  # fmt: skip
    parts += [f'<section id="{page.name}">\n{page.body}\n</section>' for page in pages]
    if rest:
        parts += ["<h2>Other figures</h2>", *(_image(path.stem, path) for path in rest)]
    return "\n".join([*parts, "</body>", "</html>"]) + "\n"


def _place(name: str) -> int:
    return next((index for index, start in enumerate(FIRST) if name.startswith(start)), len(FIRST))


def _page(path: Path) -> Page:
    text = path.read_text(encoding="utf-8")
    found = re.search(r"^# (.+)$", text, re.MULTILINE)
    return Page(path.stem, found[1] if found else path.stem, "\n".join(_blocks(text, path.parent)))


def _pictures(page: Path) -> list[Path]:
    return [page.parent / name for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8"))]


# --- Markdown, as far as our pages use it -----------------------------------------------------------------------------


def _blocks(text: str, folder: Path) -> Iterator[str]:
    """HTML of what blank lines separate: headings, tables, lists, code, pictures, paragraphs."""
    fenced = re.split(r"^```\w*\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    for index, part in enumerate(fenced):
        if index % 2:
            yield f"<pre>{html.escape(part)}</pre>"
            continue
        for block in re.split(r"\n\s*\n", part):
            if block.strip():
                yield _block(block.strip("\n"), folder)


def _block(block: str, folder: Path) -> str:
    lines = block.splitlines()
    heading = re.match(r"(#+) (.+)", block)
    picture = re.fullmatch(r"!\[([^]]*)\]\(([^)]+)\)", block.strip())
    if heading and len(lines) == 1:
        level = min(len(heading[1]) + 1, 4)  # a page's own title is a part of this file
        return f"<h{level}>{_inline(heading[2])}</h{level}>"
    if picture:
        return _image(picture[1], folder / picture[2])
    if lines[0].startswith("|"):
        return _table(lines)
    if all(line.startswith("    ") for line in lines):
        return f"<pre>{html.escape(chr(10).join(line[4:] for line in lines))}</pre>"
    if re.match(r"[*-] ", block):
        items = re.split(r"^[*-] ", block, flags=re.MULTILINE)[1:]
        return "<ul>" + "".join(f"<li>{_inline(' '.join(item.split()))}</li>" for item in items) + "</ul>"
    return f"<p>{_inline(' '.join(lines))}</p>"


def _table(lines: Sequence[str]) -> str:
    head, _, *rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
    cells = ["".join(f"<th>{_inline(cell)}</th>" for cell in head)]
    cells += ["".join(f"<td>{_inline(cell)}</td>" for cell in row) for row in rows]
    return '<div class="wide"><table>' + "\n".join(f"<tr>{row}</tr>" for row in cells) + "</table></div>"


def _inline(text: str) -> str:
    """Code, bold, emphasis and links."""
    parts = re.split(r"`([^`]+)`", text)
    return "".join(f"<code>{html.escape(p)}</code>" if index % 2 else _marks(p) for index, p in enumerate(parts))


def _marks(text: str) -> str:
    text = html.escape(text, quote=False)
    text = re.sub(r"\[([^]]+)\]\((https?://[^)\s]+)\)", r'<a href="\2">\1</a>', text)
    text = re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", text)  # what is beside the page is not beside this file
    text = re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", text)
    return re.sub(r"(?<![\w*])\*([^*\s][^*]*)\*(?![\w*])", r"<i>\1</i>", text)


def _image(title: str, path: Path) -> str:
    """A figure, in the file itself.

    Raises:
        ConfigError: a page shows one that is not there.
    """
    try:
        data = base64.b64encode(path.read_bytes()).decode()
    except OSError as error:
        raise ConfigError(f"figure '{path}' of a page cannot be read ({error.strerror}); make it again") from error
    return f'<figure><img alt="{html.escape(title)}" src="data:image/png;base64,{data}"></figure>'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.html", help="what is written")
    given = parser.parse_args()
    try:
        given.output.write_text(report(given.results), encoding="utf-8")
    except OSError as error:
        sys.exit(f"report.py: '{given.output}' cannot be written ({error.strerror}); choose another place")
    except ConfigError as error:
        sys.exit(f"report.py: {error}")


if __name__ == "__main__":
    main()
