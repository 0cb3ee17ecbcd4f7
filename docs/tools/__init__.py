"""The generators of tables, pages and pictures; `python -m docs.tools` runs all of them."""
