"""A run's folder: its files, metrics, checkpoints, lock, signals, and the students in it."""
