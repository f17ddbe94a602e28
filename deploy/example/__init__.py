"""The consortium that `amalgram simulate --init` writes."""
