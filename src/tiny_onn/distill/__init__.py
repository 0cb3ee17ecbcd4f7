"""Online distillation, with its loop, step, stages and optimizer, and the records of a run."""
