"""From documents to packed rows of tokens, and which rows are for which purpose."""
