"""Moving queries and vectors from the old encoder to the new one, stage by stage, and back."""
