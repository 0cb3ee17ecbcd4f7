"""The settings of a run: what they are, how they are read and checked."""
