"""The documentation as a site: `make docs` builds it into output/site.

Its source folder is the repository, so that every page is one Markdown file whose links work on the
site and in the repository alike.  generate.py fills their tables.
"""

import json
from pathlib import Path

import latex2mathml.converter

project = "SharedKD"
author = "the SharedKD contributors"
copyright = author
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

root_doc = "docs/index"
include_patterns = [
    "*.md",
    "docs/*.md",
    "docs/tutorial.ipynb",
    "datasets/README.md",
    "projects/SharedKD/README.md",
]
exclude_patterns = [".*", "output", "build", "tests", "configs", "tools"]
source_suffix = {".md": "markdown", ".ipynb": "markdown"}

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signature shows them
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = project
html_static_path = []
html_copy_source = False
html_show_sphinx = False
math_number_all = False


def notebook_to_markdown(app, page, source):
    """A notebook is a page of its cells: text as it is, code in blocks."""
    if Path(app.env.doc2path(page)).suffix != ".ipynb":
        return
    cells = [(c["cell_type"], "".join(c["source"])) for c in json.loads(source[0])["cells"]]
    source[0] = "\n\n".join(
        text if kind == "markdown" else f"```python\n{text}\n```" for kind, text in cells
    )


def section_first(app, what, name, thing, options, lines):
    """A docstring that begins with a section: Python takes the indentation of its lines away."""
    if lines[0:1] == ["Raises:"]:
        end = lines.index("") if "" in lines else len(lines)
        lines[1:end] = [f"    {line}" for line in lines[1:end]]


def math(display):
    """Formulas as MathML: browsers draw it themselves, nothing is loaded from elsewhere."""

    def visit(writer, node):
        from docutils.nodes import SkipNode

        mathml = latex2mathml.converter.convert(node.astext(), display=display)
        writer.body.append(f"<p>{mathml}</p>" if display == "block" else mathml)
        raise SkipNode

    return visit


def front_page(app, error):
    """The site opens at its root."""
    if error is None and app.builder.name == "html":
        target = f"{root_doc}.html"
        page = f'<!doctype html><title>{project}</title><meta http-equiv="refresh" content="0; url={target}">'
        Path(app.outdir, "index.html").write_text(f'{page}<a href="{target}">{project}</a>\n')


def setup(app):
    app.connect("source-read", notebook_to_markdown)
    app.connect("autodoc-process-docstring", section_first, priority=100)  # before napoleon
    app.connect("build-finished", front_page)
    app.add_html_math_renderer("mathml", (math("inline"), None), (math("block"), None))


html_math_renderer = "mathml"
