"""Entry points to a catalog; a broken plugin is a row with its reason."""
