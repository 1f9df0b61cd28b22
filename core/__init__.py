"""What every stage needs: errors, the typed configuration, text sources, artifacts, progress, the process world."""
