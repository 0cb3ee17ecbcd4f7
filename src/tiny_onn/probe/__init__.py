"""The test of every surprise against the truth: how the loss changes without the expert."""
