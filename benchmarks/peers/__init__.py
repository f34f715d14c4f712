"""Other libraries, behind one call each."""
