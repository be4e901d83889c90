"""Maps and rings."""
