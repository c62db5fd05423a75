"""Several adapters as one: what each method makes of the changes that they make to one target."""
