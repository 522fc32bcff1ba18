"""Training an encoder: settings, inputs, the loop, its run folder, validation, several processes."""
