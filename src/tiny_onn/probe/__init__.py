"""Every surprise held against the truth: the loss without that expert."""
