"""From the dense model to the student: partition, gates and verification."""
