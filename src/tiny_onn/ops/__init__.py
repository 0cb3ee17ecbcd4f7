"""The expert layer's operators: their definition (`reference`) and their fast path (`dense_masked`)."""
