"""A finished student put to use: it continues a prompt, or is written for other programs."""
