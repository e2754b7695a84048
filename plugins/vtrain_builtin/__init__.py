"""vtrain's first-party parts, registered through the same hooks as anyone's."""
