"""The settings of a run, their defaults and texts, and the code that reads and checks them."""
