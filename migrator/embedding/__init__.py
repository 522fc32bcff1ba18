"""Images to vectors, and the vectors that a collection holds already."""
