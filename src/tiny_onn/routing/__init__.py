"""The thresholds, steering, budgets and statistics that move and measure routers in training."""
