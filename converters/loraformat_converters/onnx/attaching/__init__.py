"""Attaching to a graph: what stands beside a weight or in its product, as a branch, as slots and for each row."""
