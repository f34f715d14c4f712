"""`make gpu`: kernels and whole models at full size, and tuning. host_time.py alone needs no GPU."""
