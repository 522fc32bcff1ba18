"""Images: where their files are, how they are decoded, and how they become the input of a model."""
