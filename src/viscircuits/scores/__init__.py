"""Scores between units of adjacent layers, and the ways to compute them."""
