"""The Markdown of every page beside its HTML, and `llms.txt`, which lists them."""

from __future__ import annotations

from pathlib import Path

from sphinx.application import Sphinx

SUMMARY = "Supervised local learning for PyTorch: a network is cut into blocks, each trained by its own loss."


def publish(app: Sphinx, error: Exception | None) -> None:
    """Build them from what was read for the HTML."""
    if error is not None or app.builder.name != "html":
        return
    options = dict(app.config.overrides)  # the same, so that nothing is read again
    Sphinx(app.srcdir, app.confdir, app.outdir, app.doctreedir, "markdown", options, status=None, warning=None).build()
    pages = [f"- [{_title(app, page)}]({page}.md)" for page in sorted(app.env.found_docs)]
    text = [f"# {app.config.project}", "", f"> {SUMMARY}", "", "## Pages", "", *pages, ""]
    (Path(app.outdir) / "llms.txt").write_text("\n".join(text), encoding="utf-8")


def _title(app: Sphinx, page: str) -> str:
    """Of a page; its name where it has none."""
    title = app.env.titles[page].astext()
    return page if title == "<no title>" else title
