"""Studies of several runs: their comparison, the report, and the demonstration."""
