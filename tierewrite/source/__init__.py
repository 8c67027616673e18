"""What a checkpoint holds on disk: files opened, headers and index read and checked."""
