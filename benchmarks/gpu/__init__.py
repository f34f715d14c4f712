"""`make gpu`: tests, kernels, whole models at full size, tuning and profiles in one run."""
