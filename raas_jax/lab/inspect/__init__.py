"""What a cache holds while it decodes, and what it could have held."""
