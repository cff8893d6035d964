"""Measurements of trained models: their weights, and their states on a text. Numbers only, no drawing."""
