"""A student at work."""
