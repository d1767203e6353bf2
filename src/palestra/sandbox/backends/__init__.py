"""One interface, and what implements it."""
