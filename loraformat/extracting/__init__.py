"""What two models differ in: pairs of their weights, the nearest adapter between them, and what no adapter of pairs holds."""
