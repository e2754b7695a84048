"""`vtrain plugins new`: a complete package of each kind, from templates that lie beside this and are shipped in the wheel."""
