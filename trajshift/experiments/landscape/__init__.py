"""The synthetic study of section 4.1 (figures 4 and 5): eight rotated copies of one function in the plane."""
