"""Pages, figures and tables about runs, from plain dictionaries: nothing here loads torch."""
