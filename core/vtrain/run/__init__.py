"""One run from its configuration to the last checkpoint, as a stream of events."""
