"""What vtrain_sanavideo registers."""
