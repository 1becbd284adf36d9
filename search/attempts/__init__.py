"""Attempts at a trial that were lost: why, how often, and what the next one is given."""
