"""Functions on tensors that compute the expert layer, surprise, router gradients and the loss."""
