"""What a tracking service is told of a study."""
