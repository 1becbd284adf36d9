"""What is stored of a study, who may write it, and whether it agrees with itself."""
