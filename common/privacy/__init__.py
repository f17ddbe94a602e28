"""Differential privacy: where its noise comes from, and what it bounds."""
