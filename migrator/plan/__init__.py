"""What an upgrade costs, and whether it can be done."""
