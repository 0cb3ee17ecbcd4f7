"""Studies of quality: what a student becomes. See README.md."""
