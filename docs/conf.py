"""Sphinx's settings: the guides as web pages, `make docs`. Warnings are errors there."""

from pathlib import Path

from sphinx.application import Sphinx

project = "megatron_sr1"
extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
root_doc = "index"
exclude_patterns = ["_build"]
html_theme = "alabaster"
html_theme_options = {"description": "Self-rewarding training of Qwen2.5-VL", "page_width": "72em"}
html_show_copyright = False
html_copy_source = False
myst_heading_anchors = 3
# Files of the checkout that pages link to, as ../examples/own_reward.py, are shown on no page.
ANNOUNCED = ("algorithms.md", "bench.md", "checkpoints.md", "planner.md", "slurm.md")


def drop_links(app: Sphinx, page: str, source: list[str]) -> None:
    """Show a link to an announced page as text where this checkout does not have it."""
    for name in ANNOUNCED:
        if not (Path(app.srcdir) / name).exists():
            source[0] = source[0].replace(f"]({name})", "]")


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", drop_links)
