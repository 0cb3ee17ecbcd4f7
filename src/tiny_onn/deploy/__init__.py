"""A trained student in use: generated text."""
