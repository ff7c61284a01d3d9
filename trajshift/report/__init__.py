"""The page of one run or many, from saved files alone, without torch."""
