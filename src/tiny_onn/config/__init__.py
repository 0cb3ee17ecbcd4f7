"""The settings of a run: their definition, how they are read, and how they are checked."""
