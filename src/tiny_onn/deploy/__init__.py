"""A finished student put to use: it continues a prompt."""
