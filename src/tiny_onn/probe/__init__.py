"""A comparison of every kind of surprise with the true effect: the loss without that expert."""
