"""The rooms behind lab6_utils, which says what is where; import that, not these."""
