"""Evaluation of generated clips: features, distances between sets, quality of pairs, and how sure a number is."""
