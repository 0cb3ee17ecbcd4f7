"""The student as it is saved: attention, router, experts, and access to its backbone."""
