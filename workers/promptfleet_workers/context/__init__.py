"""Make a chat fit its model: what is remembered before it, what is left out, what is summarised."""
