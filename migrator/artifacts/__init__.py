"""Files that a migration keeps: undo log, copies, stamps, and what a verification pinned."""
