"""Studies behind the tables and figures of results/; they are not part of the installed package."""
