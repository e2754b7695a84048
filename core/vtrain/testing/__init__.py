"""What a plugin's own tests import: the conformance kit."""
