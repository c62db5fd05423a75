"""Linear algebra of what adapters are made of: exact in the factors of pairs, truncated where a matrix is dense."""
