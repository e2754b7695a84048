"""Config and catalog to a plan: built, checked and priced without torch."""
