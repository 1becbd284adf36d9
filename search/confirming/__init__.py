"""The front of a study on the test set: a study of its own."""
