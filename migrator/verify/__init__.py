"""Proof, on sampled queries, that the new encoder's search is at least as good as today's."""
