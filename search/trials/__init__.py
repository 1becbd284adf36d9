"""A trial in its process."""
