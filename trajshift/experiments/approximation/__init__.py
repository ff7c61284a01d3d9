"""The approximation error of the shift (section 3.3, figure 3, equation 5), and whether a better shift lowers it."""
