"""What the ops share: choice of a backend, launches, numerics."""
