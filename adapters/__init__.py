"""Vector stores: one interface, one file a store."""
