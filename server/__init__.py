"""The coordinator's side: the only code that sees totals."""
