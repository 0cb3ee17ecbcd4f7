"""The conversion of a dense model to a student, which consists of partition, gates and checks."""
