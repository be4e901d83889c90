"""What is loaded in the whole system, ours or not, and its code."""
