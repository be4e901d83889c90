"""Object files: read, checked, loaded, and what is said of those that are refused."""
