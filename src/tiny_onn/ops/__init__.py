"""The expert layer's operators: the definition (`reference`), the fast path (`dense_masked`)."""
