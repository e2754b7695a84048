"""Videos from the model being trained."""
