"""The registry of environments: database and blobs, uploads, the index that pip and uv read, pages and their API."""
