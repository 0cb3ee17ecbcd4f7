"""What moves and measures routers during training: thresholds, steering, budgets, statistics."""
