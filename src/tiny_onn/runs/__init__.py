"""The folder of a run, with its metrics, checkpoints, lock and students, and stop signals."""
