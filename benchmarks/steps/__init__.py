"""Whole steps of a network, training and sampling: made in several ways, measured, split into parts, predicted."""
