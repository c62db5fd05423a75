"""Changing a graph: the weights that change and why one cannot, merges, the changed copy, its record and the way back."""
