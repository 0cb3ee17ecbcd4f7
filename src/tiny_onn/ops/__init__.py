"""Functions on tensors: the expert layer and its paths, surprise, and the distillation loss."""
