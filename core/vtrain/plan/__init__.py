"""Config and catalog to a plan: built and checked without torch."""
