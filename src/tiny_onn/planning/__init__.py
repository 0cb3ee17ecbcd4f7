"""Parameters, FLOPs, memory and time of a run before it starts, and what to lower when memory runs out."""
