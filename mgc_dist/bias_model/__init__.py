"""A frozen bias model: states of every row, cross-fitted heads, the table that training reads."""
