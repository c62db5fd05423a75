"""Proving a written model: by the other way to the same numbers, run by ONNX Runtime."""
