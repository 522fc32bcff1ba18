"""Where a migration stands, what still counts, and which command comes next."""
