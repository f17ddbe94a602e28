"""One owner's side: the only code that sees private rows."""
