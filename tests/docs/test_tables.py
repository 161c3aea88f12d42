"""The tables of the pages are those of the code and of the records."""

import importlib.util

import tiny


def test_the_pages_have_the_tables_of_today():
    spec = importlib.util.spec_from_file_location("generate", tiny.ROOT / "docs/generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    tables = generate.tables()
    pages = {page: (tiny.ROOT / page).read_text() for page, _ in tables}
    assert "`train.inherit_images`" in pages["docs/config.md"]
    for (page, name), table in tables.items():
        fix = f"run docs/generate.py for {name}"
        assert generate.fill(pages[page], name, table) == pages[page], fix
