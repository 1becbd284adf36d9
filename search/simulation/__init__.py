"""The same searcher and scheduler in virtual time."""
