"""Scripts for people to start from. A package, so that no other one of this name comes first."""
