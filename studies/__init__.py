"""Studies behind the tables and figures of results/; they are no part of the installed package."""
