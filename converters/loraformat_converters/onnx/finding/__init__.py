"""Finding targets in a graph: by what witnesses call its weights, and by what those hold."""
