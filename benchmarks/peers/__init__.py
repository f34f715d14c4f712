"""Functions of other libraries (peers), each behind one call."""
