"""Programs: what they are, trial runs, and the way to the hooks."""
