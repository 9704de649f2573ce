"""Images in three roles (train, validation, test), from a path to batches."""
