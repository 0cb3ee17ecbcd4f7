"""Online distillation: the loop, the step, its stages and optimizer, and what a run records."""
