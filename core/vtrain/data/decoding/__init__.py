"""Files to pixels: probing and decoding of untrusted files, in processes of their own."""
