"""Execute notebooks from top to bottom with their progress on the terminal.

    python tools/execute.py student.ipynb --to build --html     # what `make run` does
    python tools/execute.py student.ipynb EDA.ipynb             # in place: what `make render` does

The kernel runs in the folder of the notebook. Progress bars go to the terminal and never into the notebook.
"""

import argparse
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
from latex2mathml.converter import convert
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert import HTMLExporter
from nbformat import NotebookNode

WIDGET = "application/vnd.jupyter.widget-view+json"


class TerminalClient(NotebookClient):
    """A notebook client that also shows on the terminal what the cells print."""

    def process_message(self, msg: dict[str, Any], cell: NotebookNode, cell_index: int) -> NotebookNode | None:
        """Show text output at once; keep progress bars (stderr with carriage returns) out of the notebook."""
        if msg["msg_type"] == "stream":
            stream, text = msg["content"]["name"], msg["content"]["text"]
            print(text, end="", file=sys.stderr if stream == "stderr" else sys.stdout, flush=True)
            if stream == "stderr" and "\r" in text:
                return None
        return super().process_message(msg, cell, cell_index)


def heading(cell: NotebookNode) -> str | None:
    """The first heading of a Markdown cell."""
    found = re.search(r"^#+ (.+)$", cell.source, re.MULTILINE) if cell.cell_type == "markdown" else None
    return found.group(1) if found else None


def execute(source: Path) -> NotebookNode:
    """Run every cell of `source` in a new kernel; CellExecutionError when one fails."""
    book = nbformat.read(source, as_version=4)
    for cell in book.cells:
        cell.metadata.pop("execution", None)
    folder = {"metadata": {"path": str(source.parent.resolve())}}
    client = TerminalClient(
        book, timeout=None, kernel_name="python3", resources=folder, record_timing=False, coalesce_streams=True
    )
    client.extra_arguments = ["--log-level=ERROR"]  # else the kernel warns about its own local port
    client.reset_execution_trackers()
    with client.setup_kernel():
        for index, cell in enumerate(book.cells):
            if title := heading(cell):
                print(f"\n── {title}", flush=True)
            client.execute_cell(cell, index)
    for output in (output for cell in book.cells for output in cell.get("outputs", ())):
        output.get("data", {}).pop(WIDGET, None)  # its picture stays: no kernel, no widget
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    book.metadata = nbformat.from_dict({"kernelspec": kernel, "language_info": {"name": "python"}})
    return book


def write_text(path: Path, text: str) -> None:
    """Write to a temporary name, then rename, so that a stop never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, suffix=path.suffix, delete=False) as file:
        file.write(text)
    Path(file.name).chmod(0o644)
    os.replace(file.name, path)


def to_html(book: NotebookNode) -> str:
    """One self-contained page: pictures embedded, formulas as MathML, nothing to be loaded from elsewhere."""
    page, formulas = nbformat.from_dict(book), list[str]()

    def keep(found: re.Match[str]) -> str:
        # The exporter's HTML cleaner takes MathML apart, so a word holds the place until it is done.
        formulas.append(convert(found[2].strip(), display="block" if found[1] == "$$" else "inline"))
        return f"FORMULA{len(formulas) - 1}HERE"

    for cell in page.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"(\$\$?)(.+?)\1", keep, cell.source, flags=re.S)
    exporter = HTMLExporter(
        template_name="classic", embed_images=True, mathjax_url="", require_js_url="", jquery_url=""
    )
    body, _ = exporter.from_notebook_node(page)
    body = re.sub(r"FORMULA(\d+)HERE", lambda found: formulas[int(found[1])], body)
    body = re.sub(r'<script[^>]*src="[^"]*"[^>]*>\s*</script>', "", body)
    return re.sub(r"<script(?:(?!</script>).)*mermaid(?:(?!</script>).)*</script>", "", body, flags=re.S)  # unused here


def main() -> int:
    """Execute the notebooks named on the command line; exit status 1 when a cell fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--to", type=Path, help="folder for the results (default: in place)")
    parser.add_argument("--html", action="store_true", help="also write a self-contained HTML page")
    options = parser.parse_args()
    for source in options.notebooks:
        start, target = time.perf_counter(), (options.to or source.parent) / source.name
        print(f"executing {source}", flush=True)
        try:
            book = execute(source)
        except CellExecutionError as error:
            print(f"\n{source} failed; {target} was not written:\n{error}", file=sys.stderr)
            return 1
        write_text(target, nbformat.writes(book) + "\n")
        written = [target]
        if options.html:
            written.append(target.with_suffix(".html"))
            write_text(written[-1], to_html(book))
        print(f"\nexecuted in {time.perf_counter() - start:.0f} s; wrote {' and '.join(map(str, written))}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
