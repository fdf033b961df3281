"""The Markdown of every page beside its HTML, and `llms.txt`, which lists them."""

from __future__ import annotations

from pathlib import Path

from sphinx.application import Sphinx

SUMMARY = "Supervised local learning for PyTorch: a network is cut into blocks, each trained by its own loss."


def publish(app: Sphinx, error: Exception | None) -> None:
    """Build them from what was read for the HTML."""
    if error is not None or app.builder.name != "html":
        return
    options = {"nb_execution_mode": "off"}  # what was read holds the outputs
    Sphinx(app.srcdir, app.confdir, app.outdir, app.doctreedir, "markdown", options, status=None, warning=None).build()
    pages = [f"- [{app.env.titles[page].astext()}]({page}.md)" for page in sorted(app.env.found_docs)]
    text = [f"# {app.config.project}", "", f"> {SUMMARY}", "", "## Pages", "", *pages, ""]
    (Path(app.outdir) / "llms.txt").write_text("\n".join(text), encoding="utf-8")
