"""What is shown of a study."""
