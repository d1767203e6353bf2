"""The loop as discrete events: what a recipe would do on given engines and a given trainer. Pure, deterministic."""
