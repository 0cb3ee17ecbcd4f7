"""Studies that start several runs and compare them."""
