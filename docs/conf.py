"""Sphinx's settings: the guides as web pages, `make docs`. Warnings are errors there."""

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
