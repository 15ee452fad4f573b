"""How Sphinx builds the documentation: `make docs`. Needs no network, so there is no intersphinx."""

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
smartquotes = False  # what is quoted of the log is to be found in the log

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signature has none then, the docstring's sections say what matters
napoleon_numpy_docstring = False
napoleon_use_ivar = True


def skip_member(_app, _what, _name, member, skip, _options):
    """Leave out the fields of named tuples, of which Python itself says no more than their numbers."""
    return skip or (getattr(member, "__doc__", None) or "").startswith("Alias for field number")


def setup(app):
    """Called by Sphinx."""
    app.connect("autodoc-skip-member", skip_member)
