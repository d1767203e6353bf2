"""What keeps a hub running among many: health, metrics, logs, limits, an orderly end, copies."""
