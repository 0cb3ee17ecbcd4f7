"""A dense model: found, checked, loaded and quantised."""
