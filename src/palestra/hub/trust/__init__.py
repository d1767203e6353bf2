"""Whether an environment does what it says: what was pushed is built, loaded and played in a sandbox, and judged."""
