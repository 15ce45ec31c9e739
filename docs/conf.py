"""How Sphinx builds these pages.

python -m sphinx -W -b html docs docs/_build/html
"""

import importlib.metadata
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
# Sphinx shows the outputs that the notebooks were saved with.
nb_execution_mode = "off"

autodoc_typehints = "none"
autodoc_member_order = "bysource"
default_role = "code"

html_theme = "sphinx_book_theme"
html_title = f"memoptax {release}"
html_theme_options = {"show_navbar_depth": 1, "show_toc_level": 2}


def copy_notebooks():
    """Sphinx reads only what is in its own folder."""
    gallery = HERE / "gallery"
    shutil.rmtree(gallery, ignore_errors=True)
    gallery.mkdir()
    for notebook in (HERE.parent / "notebooks").glob("*.ipynb"):
        shutil.copy(notebook, gallery)


copy_notebooks()
