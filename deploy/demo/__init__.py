"""The embedded default: real handwritten digits, a tiny vision transformer, five owners."""
