"""The expert layer: definition (`reference`), dense path, grouped path, and which when."""
