"""Sphinx configuration for `make docs`. No intersphinx, because the build must work without a network."""

import socs_monitor

project = "socs-monitor"
version = release = socs_monitor.__version__
html_title = f"socs-monitor {version}"
html_theme = "furo"
html_show_copyright = False

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinxarg.ext",
]
exclude_patterns = ["_build"]
default_role = "py:obj"
smartquotes = False  # so that quoted messages can be searched for in the log

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings describe the types
napoleon_numpy_docstring = False
napoleon_use_ivar = True


def skip_member(_app, _what, _name, member, skip, _options):
    """Skip the fields of named tuples, whose generated docstrings only give their positions."""
    return skip or (getattr(member, "__doc__", None) or "").startswith("Alias for field number")


def setup(app):
    """Register the hook. Called by Sphinx."""
    app.connect("autodoc-skip-member", skip_member)
