"""What is trained on: lists of images, their prepared pixels, classes, batches and their augmentation."""
