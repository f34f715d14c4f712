"""What runs on a GPU only: `make gpu`, kernels and whole models at full size, and tuning."""
