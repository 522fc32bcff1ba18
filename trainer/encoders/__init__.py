"""Encoders: networks from wherever they come, their weights, manifests and exports."""
