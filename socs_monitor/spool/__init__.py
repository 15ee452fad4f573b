"""Every accepted registration, kept on disk until its row is safe."""
