"""Data: from files to augmented batches."""
