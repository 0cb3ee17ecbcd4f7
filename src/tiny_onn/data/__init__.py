"""Documents read from their sources, packed into rows of tokens, and dealt out to their uses."""
