"""What a graph is: its scopes and stored tensors, its operators and what they make of a weight; new nodes, and writing it."""
