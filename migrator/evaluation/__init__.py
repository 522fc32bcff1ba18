"""Pure measurements and decisions: no store, no ledger."""
