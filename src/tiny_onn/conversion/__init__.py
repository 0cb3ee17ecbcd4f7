"""From the dense model to the student: neurons dealt out to experts, gates fitted, the result verified."""
