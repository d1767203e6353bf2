"""Changes of the schema, applied by `Database.migrate`."""
