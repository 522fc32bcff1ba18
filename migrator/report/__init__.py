"""One page that says how a migration stands, for those who decide on it and those who run it."""
