"""How Sphinx builds these pages.

python -m sphinx -W -b html docs docs/_build/html
"""

import importlib.metadata
import inspect
import re
import shutil
from pathlib import Path

HERE = Path(__file__).parent

project = "memoptax"
author = copyright = "The memoptax authors"
release = version = importlib.metadata.version("memoptax")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["dollarmath", "fieldlist"]
myst_heading_anchors = 3
# Sphinx runs each notebook from top to bottom, and again when it has changed.
nb_execution_mode = "cache"
nb_execution_timeout = 600  # seconds a cell
nb_execution_raise_on_error = True

autodoc_typehints = "none"
autodoc_member_order = "bysource"
default_role = "code"

# The version with which the equations were looked at.
mathjax_path = "https://cdn.jsdelivr.net/npm/mathjax@3.2.2/es5/tex-mml-chtml.js"

html_theme = "sphinx_book_theme"
html_title = f"memoptax {release}"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_theme_options = {
    "navbar_persistent": [],  # the sidebar has the search
    "show_navbar_depth": 1,
    "show_toc_level": 2,
}


def copy_notebooks():
    """Sphinx reads only what is in its own folder."""
    gallery = HERE / "gallery"
    shutil.rmtree(gallery, ignore_errors=True)
    gallery.mkdir()
    for notebook in (HERE.parent / "notebooks").glob("*.ipynb"):
        shutil.copy(notebook, gallery)


copy_notebooks()


def list_fields(app, what, name, obj, options, lines):
    """The fields of a state, as the comments behind them say what they are."""
    if what != "class" or not hasattr(obj, "_fields"):
        return
    found = re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(obj), re.M)
    lines += ["", *(f":param {field}: {text}" for field, text in found), ""]
    lines[:] = [line.replace("*", r"\*") for line in lines]


def setup(app):
    app.connect("autodoc-process-docstring", list_fields)
