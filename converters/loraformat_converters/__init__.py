"""Layouts and bases of the frameworks, reached through loraformat's entry points."""
