"""The parameters, FLOPs, memory and time that a run will need, counted before it starts."""
