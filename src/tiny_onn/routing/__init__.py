"""Router changes and measurements in training: thresholds, steering, budgets, statistics."""
