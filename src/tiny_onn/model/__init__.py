"""The student as it is saved, with attention, router, experts and access to its backbone."""
