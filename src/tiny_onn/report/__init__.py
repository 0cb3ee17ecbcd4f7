"""Pages, figures and tables about runs, made from plain dictionaries without loading torch."""
