"""Compatible training: encoders, their images, and the losses that keep new vectors comparable with old ones."""
